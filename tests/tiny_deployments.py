"""Networks as they are deployed, without a run: drawn weights, and given formats."""

import math

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

import fliqs_jax
from fliqs_jax.exporting import deployment
from fliqs_jax.linen.discovery import discover
from fliqs_jax.training.train_state import Arguments


class Stacked(nnx.Module):
  """Three layers in a scan."""

  count = 3

  def __init__(self, rngs):
    make = nnx.vmap(self.make_layer)
    self.layers = nnx.split_rngs(splits=self.count)(make)(rngs)

  @staticmethod
  def make_layer(rngs):
    return nnx.Linear(6, 6, rngs=rngs)

  def __call__(self, x):
    step = nnx.scan(
      lambda x, layer: jnp.tanh(layer(x)), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry
    )
    return step(x, self.layers)


class Nested(Stacked):
  """Two such networks in another scan."""

  count = 2
  make_layer = staticmethod(Stacked)


def both(weights, activations=None):
  """The formats of a layer; by default one for both of its operands."""
  return {'weights': weights, 'activations': activations or weights}


def deploy(
  network, *inputs, formats=None, shared_scale='tensor', kwargs=None, **attributes
):
  """A network with drawn weights and statistics, and one assignment for all layers.

  Args:
    network: of linen or NNX.
    *inputs: arrays, a batch.
    formats: of each layer; by default int8.
    shared_scale: what shares a scale of activations.
    kwargs: of the network's call.
    **attributes: of `make_searchable`.
  """
  kwargs = kwargs or {}
  model = fliqs_jax.make_searchable(
    network, activation_scale=shared_scale, **attributes
  )
  init = lambda: model.init(jax.random.key(0), *inputs, **kwargs)
  rng = np.random.default_rng(0)
  # Drawn by NumPy, which compiles nothing.
  variables = jax.tree_util.tree_map_with_path(
    lambda path, leaf: _drawn(rng, path[-1].key, leaf), jax.eval_shape(init)
  )
  layers = discover(model, *inputs, **kwargs)
  formats = {layer.path: formats or both('int8') for layer in layers}
  return deployment.deploy(
    model,
    network,
    lambda *args: Arguments(args, kwargs),
    variables,
    layers,
    {'formats': formats, 'model': 'test'},
    [tuple(map(np.asarray, inputs))],
    shared_scale=shared_scale,
  )


def _drawn(rng, name, leaf):
  """Returns values of one variable: averages are positive, scales near 1."""
  if not np.issubdtype(leaf.dtype, np.floating):
    return np.zeros(leaf.shape, leaf.dtype)
  values = rng.normal(size=leaf.shape)
  if name in ('var', 'scale') or name.endswith('mean_square'):
    values = np.exp(0.1 * values)
  elif name.endswith('absmax'):
    values = 4 * np.exp(0.1 * values)
  elif leaf.ndim > 1:
    values /= math.sqrt(leaf.size / leaf.shape[-1])
  return values.astype(leaf.dtype)
