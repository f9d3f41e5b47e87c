"""Smoothing: what is scaled, by how much, and that the function stays the same."""

from flax import linen as nn
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fliqs_jax
from fliqs_jax.errors import ConfigError
from fliqs_jax.models.decoder import Decoder
from fliqs_jax.models.encoder import Encoder, SentenceEncoder
from fliqs_jax.numerics.calibration import CALIBRATIONS
from fliqs_jax.runs import smoothing

RNG = np.random.default_rng(0)
IMAGES = [{'image': RNG.normal(size=(4, 6, 6, 3)).astype(np.float32)} for _ in range(2)]
ROWS = [{'image': RNG.normal(size=(8, 6)).astype(np.float32)} for _ in range(2)]
TEXTS = [{'tokens': RNG.integers(50, size=(4, 7)).astype(np.int32)} for _ in range(2)]


def mean_square(outputs, batch):
  """A loss that depends on all outputs."""
  del batch
  return jnp.mean(jnp.square(outputs).reshape(len(outputs), -1), axis=1)


def search(model, batches, monkeypatch, strength=0.5, **fields):
  """Returns the result of a search, and what it smoothed, {producer: readers}."""
  found = {}

  def recorded(*arguments):
    params, pairs = smooth(*arguments)
    found.update({pair.producer: sorted(pair.readers) for pair in pairs})
    return params, pairs

  smooth = smoothing.smooth
  monkeypatch.setattr(smoothing, 'smooth', recorded)
  arguments = {
    'strategy': 'sensitivity', 'num_steps': 0, 'formats': ('int4', 'int8'),
    'target_format': 'int4', 'refinement_rounds': 0, 'statistics_batches': 2,
    'loss': mean_square, 'num_samples': 1, 'smoothing': strength, **fields,
  }  # fmt: skip
  return fliqs_jax.search(model, batches, batches, **arguments), found


class Convolutions(nn.Module):
  """Two pairs: a batch norm and a convolution, and two convolutions, after ReLU."""

  @nn.compact
  def __call__(self, x, train):
    x = nn.Conv(5, (3, 3), name='first')(x)
    x = nn.relu(nn.BatchNorm(use_running_average=not train, name='norm')(x))
    x = nn.Conv(7, (3, 3), strides=2, name='second')(x)
    x = nn.Conv(4, (2, 2), padding='VALID', name='third')(nn.relu(x))
    return nn.Dense(3, name='head')(nn.gelu(x).mean((1, 2)))


class Residual(nnx.Module):
  """A norm that is read by a layer and added to its outputs."""

  def __init__(self, rngs):
    self.norm = nnx.LayerNorm(6, rngs=rngs)
    self.layer = nnx.Linear(6, 6, rngs=rngs)

  def __call__(self, x):
    x = self.norm(x)
    return x + self.layer(x)


def decoder():
  return Decoder(
    vocabulary_size=50, hidden_size=16, depth=1, num_heads=4, num_kv_heads=2,
    head_size=4, mlp_size=24, rngs=nnx.Rngs(0),
  )  # fmt: skip


def encoder():
  return Encoder(
    vocabulary_size=50, hidden_size=16, depth=1, num_heads=2, mlp_size=24,
    max_tokens=8, rngs=nnx.Rngs(0),
  )  # fmt: skip


def of_tokens(batch):
  return (batch['tokens'],)


def of_text(batch):
  return batch['tokens'], jnp.ones_like(batch['tokens'])


@pytest.mark.parametrize(
  'model, batches, inputs, expected',
  [
    (
      decoder, TEXTS, of_tokens,
      {
        'blocks/0/norm_attention': [
          f'blocks/0/attention/{name}' for name in ('key', 'query', 'value')
        ],
        'blocks/0/norm_mlp': ['blocks/0/mlp/gate', 'blocks/0/mlp/up'],
        # Two heads of queries read each head of values.
        'blocks/0/attention/value': ['blocks/0/attention/out'],
        'blocks/0/mlp/up': ['blocks/0/mlp/down'],
      },
    ),
    # Its norms are added to what reads them, and GELU lets no factor through.
    (
      lambda: SentenceEncoder(encoder()), TEXTS, of_text,
      {'encoder/blocks/0/value': ['encoder/blocks/0/out']},
    ),
  ],
)  # fmt: skip
def test_what_is_scaled_in_nnx(model, batches, inputs, expected, monkeypatch):
  model = model()
  result, found = search(model, batches, monkeypatch, inputs=inputs)
  assert found == expected
  _same_function(model, result, [inputs(batch) for batch in batches])


def _same_function(model, result, arguments):
  """Checks that a network of NNX with the result's parameters computes the same."""
  call = nnx.jit(lambda model, args: model(*args))
  before = [call(model, args) for args in arguments]
  graph, state = nnx.split(model)
  params = jax.tree.leaves(result.variables['params'])
  smoothed = nnx.merge(graph, jax.tree.structure(state).unflatten(params))
  for old, args in zip(before, arguments):
    np.testing.assert_allclose(call(smoothed, args), old, rtol=1e-4, atol=1e-5)
  changed = [not np.array_equal(a, b) for a, b in zip(jax.tree.leaves(state), params)]
  assert any(changed)


def test_convolutions_and_batch_norm(monkeypatch):
  model = Convolutions()
  variables = model.init(jax.random.key(0), IMAGES[0]['image'], False)
  result, found = search(model, IMAGES, monkeypatch, variables=variables)
  assert found == {'norm': ['second'], 'second': ['third']}
  before, after = (
    model.apply(
      {'params': params, 'batch_stats': variables['batch_stats']},
      IMAGES[0]['image'], True, mutable=['batch_stats'],
    )[0]
    for params in (variables['params'], result.variables['params'])
  )  # fmt: skip
  np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-6)


class WithProduct(nn.Module):
  """Two layers, and a product of a parameter that goes through none."""

  @nn.compact
  def __call__(self, x, train):
    del train
    x = nn.Dense(4, name='second')(nn.relu(nn.Dense(5, name='first')(x)))
    return x @ self.param('table', nn.initializers.normal(), (4, 3))


def test_layers_of_a_network_with_a_product_of_its_own(monkeypatch):
  model = WithProduct()
  variables = model.init(jax.random.key(0), ROWS[0]['image'], False)
  result, found = search(model, ROWS, monkeypatch, variables=variables)
  assert set(result.formats) == {'first', 'second', 'table'}
  assert found == {'first': ['second']}


def two_layers():
  """Two layers with ReLU between them, and the weights of both."""
  model = nnx.Sequential(
    nnx.Linear(6, 5, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(5, 3, rngs=nnx.Rngs(1))
  )
  return model, *(np.asarray(model.layers[i].kernel[...], np.float64) for i in (0, 2))


@pytest.mark.parametrize('strength', [0.0, 0.5, 1.0])
def test_factors_are_those_of_the_equation(strength, monkeypatch):
  model, first, last = two_layers()
  result, found = search(model, ROWS, monkeypatch, strength)
  assert found == {'layers/0': ['layers/2']}
  inputs = np.maximum(np.concatenate([b['image'] for b in ROWS]) @ first, 0).max(0)
  factors = inputs**strength / np.abs(last).max(1) ** (1 - strength)
  factors /= np.exp(np.log(factors).mean())
  params = result.variables['params']['layers']
  np.testing.assert_allclose(params['0']['kernel'], first / factors, rtol=1e-4)
  np.testing.assert_allclose(params['2']['kernel'], last * factors[:, None], rtol=1e-4)


@pytest.mark.parametrize('calibration', CALIBRATIONS)
def test_a_channel_far_above_the_others_loses_less(calibration, monkeypatch):
  model, _, _ = two_layers()
  kernel = model.layers[0].kernel
  kernel[...] = kernel[...].at[:, 0].multiply(100.0)
  last = model.layers[2].kernel
  last[...] = last[...].at[0].divide(100.0)
  fields = {'calibration': calibration, 'formats': ('int4', 'int8')}

  def lost(strength):
    result, _ = search(model, ROWS, monkeypatch, strength, **fields)
    outputs = [
      np.abs(np.asarray(result.model(b['image']) - model(b['image']))) for b in ROWS
    ]
    return np.mean(outputs)

  assert lost(0.5) < 0.5 * lost(None)


def test_where_nothing_can_be_scaled(monkeypatch):
  with pytest.raises(ConfigError, match='search.smoothing=0.5: no channels') as error:
    search(Residual(nnx.Rngs(0)), ROWS, monkeypatch)
  assert len(error.value.problems) == 1


@pytest.mark.parametrize(
  'fields, expected',
  [
    ({'strength': 1.5}, 'search.smoothing=1.5: expected a number from 0 to 1'),
    ({'num_steps': 3}, 'search.smoothing=0.5: expected num_steps=0'),
  ],
)
def test_what_is_refused(fields, expected, monkeypatch):
  with pytest.raises(ConfigError, match=expected):
    search(two_layers()[0], ROWS, monkeypatch, **fields)
