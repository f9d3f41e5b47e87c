"""The NNX adapter against linen's, from copied weights."""

from flax import linen as nn
from flax import nnx
import jax
import numpy as np

from fliqs_jax.layers.layer import BoundLayer
from fliqs_jax.linen.discovery import discover
from fliqs_jax.linen.interception import make_searchable
from fliqs_jax.layers.variables import nest
from fliqs_jax.nnx import Searchable
from fliqs_jax.numerics.formats import get_format
from fliqs_jax.numerics.products import LayerFormats


class LinenNet(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.relu(nn.Conv(4, (3, 3), name='conv')(x))
    return nn.Dense(3, name='dense')(x.mean((1, 2)))


class NnxNet(nnx.Module):
  def __init__(self, rngs):
    self.conv = nnx.Conv(2, 4, (3, 3), rngs=rngs)
    self.dense = nnx.Linear(4, 3, rngs=rngs)

  def __call__(self, x):
    return self.dense(nnx.relu(self.conv(x)).mean((1, 2)))


def test_same_layers_and_outputs_as_linen():
  x = jax.random.normal(jax.random.key(1), (2, 8, 8, 2))
  model = NnxNet(nnx.Rngs(0))
  before = nnx.graphdef(model)
  ours, theirs = Searchable(model, {}), make_searchable(LinenNet())
  found, expected = ours.discover(x[:1]), discover(theirs, x[:1])
  neutral = lambda layers: [layer._replace(operator='') for layer in layers]
  assert neutral(found) == neutral(expected)
  four = get_format('int4')
  bound = {layer.path: BoundLayer(LayerFormats(four, four)) for layer in found}
  outputs = []
  for network, layers in ((ours, found), (theirs, expected)):
    variables = network.init(jax.random.key(0), x)
    variables |= {'params': ours.init(None)['params'], 'formats': nest(layers, bound)}
    y, updated = network.apply(variables, x, mutable=['quant_stats'])
    outputs.append((y, jax.tree.leaves(updated)))
  jax.tree.map(np.testing.assert_array_equal, *outputs)
  assert nnx.graphdef(model) == before
  plain = model(x)
  assert np.abs(plain - outputs[0][0]).max() > 0
  variables = ours.init(None)
  np.testing.assert_array_equal(ours.apply(variables, x), plain)
