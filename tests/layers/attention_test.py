"""Products inside attention: found, counted, quantized."""

from collections.abc import Callable

from flax import linen as nn
from flax import nnx
import jax
from jax.nn import dot_product_attention as named_otherwise
import jax.numpy as jnp
import numpy as np
import pytest
import references

import fliqs_jax
from fliqs_jax import make_searchable
from fliqs_jax.errors import ConfigError
from fliqs_jax.layers import products
from fliqs_jax.layers.variables import FORMATS, QUANT_STATS, nest
from fliqs_jax.numerics.calibration import Statistics
from fliqs_jax.numerics.formats import get_format
from fliqs_jax.numerics.products import (
  LayerFormats,
  PairStatistics,
  quantized_pair_product,
)
from fliqs_jax.search.cost_models import get_cost_model
from fliqs_jax.search.space import OPERANDS, build_space, fixed_space, uniform_space

LENGTH, HEADS, DEPTH = 5, 2, 3
FEATURES = HEADS * DEPTH
MACS = HEADS * LENGTH * LENGTH * DEPTH  # of each product


class LinenAttention(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.MultiHeadDotProductAttention(HEADS, name='attention')(x, mask=causal())
    return nn.Dense(2, name='head')(x)


class LinenOwn(nn.Module):
  """Two attentions of its own, in one module without `nn.compact`."""

  def setup(self):
    self.project = nn.DenseGeneral((3, HEADS, DEPTH))

  def __call__(self, x):
    q, k, v = jnp.moveaxis(self.project(x), -3, 0)
    x = nn.dot_product_attention(q, k, v, mask=causal())
    return jax.nn.dot_product_attention(q, k, x, is_causal=True)


class NnxAttention(nnx.Module):
  def __init__(self, rngs):
    self.attention = nnx.MultiHeadAttention(HEADS, FEATURES, decode=False, rngs=rngs)
    self.head = nnx.Linear(FEATURES, 2, rngs=rngs)

  def __call__(self, x):
    return self.head(self.attention(x, mask=causal()))


class NnxOwn(nnx.Module):
  """Grouped-query attention of its own, in modules that a scan runs over."""

  def __init__(self, rngs):
    make = nnx.vmap(lambda key: NnxBlock(nnx.Rngs(key)))
    self.blocks = make(jax.random.split(jax.random.key(0), 3))

  def __call__(self, x):
    step = lambda x, block: block(x)
    return nnx.scan(step, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.blocks)


class NnxBlock(nnx.Module):
  def __init__(self, rngs):
    self.query = nnx.LinearGeneral(FEATURES, (HEADS, DEPTH), rngs=rngs)
    self.key = nnx.LinearGeneral(FEATURES, (1, DEPTH), rngs=rngs)

  def __call__(self, x):
    key = self.key(x)
    y = jax.nn.dot_product_attention(self.query(x), key, key, is_causal=True)
    return x + y.reshape(x.shape)


def causal():
  return jnp.tril(jnp.ones((LENGTH, LENGTH), bool))[None, None]


NETWORKS = {
  'linen attention': (LinenAttention(), ['attention/qk', 'attention/av']),
  'nnx attention': (NnxAttention(nnx.Rngs(0)), ['attention/qk', 'attention/av']),
  'nnx functions': (NnxOwn(nnx.Rngs(0)), ['blocks/qk', 'blocks/av']),
  'linen functions': (LinenOwn(), ['qk', 'av', 'qk_1', 'av_1']),
}


def inputs(batch=4):
  shape = batch, LENGTH, FEATURES
  return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def bound(layers, name):
  return bound_by(uniform_space(layers, name))


def bound_by(space):
  return {FORMATS: nest(space.layers, space.bind(jnp.zeros(0, jnp.int32)))}


@pytest.mark.parametrize('name', NETWORKS)
def test_products_inside_attention_are_searched(name):
  plain, expected = NETWORKS[name]
  x = inputs()
  default, model = make_searchable(plain), make_searchable(plain, True)
  layers = model.coverage(x[:1]).layers
  pairs = [layer for layer in layers if layer.kind == 'activations']
  assert [layer.path for layer in pairs] == expected
  assert [layer for layer in layers if layer not in pairs] == list(
    default.coverage(x[:1]).layers
  )
  calls = 3 if name == 'nnx functions' else 1
  expected = calls * MACS, 0, calls
  assert all((layer.macs, layer.params, layer.calls) == expected for layer in pairs)

  def cost(model_name, layers):
    return get_cost_model(model_name).uniform(layers, 'int4')

  key = FEATURES // HEADS if name == 'nnx functions' else FEATURES
  elements = (FEATURES + key) * LENGTH, (HEADS * LENGTH + key) * LENGTH
  assert cost('bops', pairs) * 1e9 == pytest.approx(len(pairs) * calls * MACS * 16)
  assert cost('model_size', pairs) == 0
  assert cost('activation_bytes', pairs[:1]) == calls * elements[0] / 2
  assert cost('activation_bytes', pairs[1:2]) == calls * elements[1] / 2

  variables = jax.jit(model.init)(jax.random.key(0), x)
  own = jax.jit(default.apply)({'params': variables['params']}, x)
  traces = []

  @jax.jit
  def step(variables, formats):
    traces.append(1)
    return model.apply({**variables, **formats}, x, mutable=[QUANT_STATS])

  results = {}
  for format in ('float32', 'int4', 'int8', 'int3'):
    formats = bound(layers, format)
    _, updated = step(variables, formats)
    results[format], _ = step({**variables, **updated}, formats)
  assert len(traces) == 1
  np.testing.assert_allclose(results['float32'], own, rtol=1e-5, atol=1e-6)
  errors = [np.abs(results[f] - own).max() for f in ('int8', 'int4', 'int3')]
  assert 0 < errors[0] < errors[1] < errors[2]
  # The products alone, quantized, make a difference.
  names = {
    layer.path: dict.fromkeys(OPERANDS, 'int3' if layer in pairs else 'float32')
    for layer in layers
  }
  formats = bound_by(fixed_space(layers, names))
  _, updated = step(variables, formats)
  changed, _ = step({**variables, **updated}, formats)
  assert 0 < np.abs(changed - own).max() < errors[2]


def attend(query, key, value):
  return named_otherwise(query, key, value)


class LinenNamed(nn.Module):
  """Attention by names of the user's: imported, in a function, in an attribute."""

  function: Callable = nn.dot_product_attention

  @nn.compact
  def __call__(self, x):
    q, k, v = jnp.moveaxis(nn.DenseGeneral((3, HEADS, DEPTH), name='qkv')(x), -3, 0)
    return attend(q, named_otherwise(q, k, v), self.function(q, k, v))


class NnxNamed(nnx.Module):
  def __init__(self, function):
    self.qkv = nnx.LinearGeneral(FEATURES, (3, HEADS, DEPTH), rngs=nnx.Rngs(0))
    self.function = function

  def __call__(self, x):
    return self.function(*jnp.moveaxis(self.qkv(x), -3, 0))


class NnxCalling(NnxNamed):
  def __call__(self, x):
    return attend(*jnp.moveaxis(self.qkv(x), -3, 0))


@pytest.mark.parametrize(
  'plain, expected',
  [
    (LinenNamed(), ['qk', 'av', 'qk_1', 'av_1', 'qk_2', 'av_2']),
    (NnxNamed(nnx.dot_product_attention), ['qk', 'av']),
    (NnxCalling(None), ['qk', 'av']),
  ],
)
def test_functions_of_attention_are_found_by_any_name(plain, expected):
  x, model = inputs(1), make_searchable(plain, True)
  coverage = model.coverage(x)
  assert [layer.path for layer in coverage.layers] == ['qkv', *expected]
  assert not coverage.skipped
  names = {
    layer.path: dict.fromkeys(OPERANDS, 'float32' if layer.params else 'int3')
    for layer in coverage.layers
  }
  variables = model.init(jax.random.key(0), x)
  formats = bound_by(fixed_space(coverage.layers, names))
  outputs = model.apply({**variables, **formats}, x)
  assert 0 < np.abs(outputs - model.apply(variables, x)).max() < 1
  assert named_otherwise is jax.nn.dot_product_attention


def written_out(query, key, value):
  weights = jax.nn.softmax(jnp.einsum('bqhd,bkhd->bhqk', query, key))
  return jnp.einsum('bhqk,bkhd->bqhd', weights, value)


def test_other_products_of_activations_are_named():
  model = NnxNamed(written_out)
  assert not make_searchable(model).coverage(inputs(1)).skipped
  coverage = make_searchable(model, True).coverage(inputs(1))
  assert [layer.path for layer in coverage.layers] == ['qkv']
  first = written_out.__code__.co_firstlineno + 1
  assert [place.rpartition(':')[2] for place in coverage.skipped] == [
    str(first), str(first + 1),
  ]  # fmt: skip
  for place, why in coverage.skipped.items():
    assert place.startswith(f'written_out in {__file__}')
    assert 'it multiplies activations (1, 5, 2, 3) by activations (1, ' in why


@pytest.mark.parametrize('scale', ['tensor', 'token'])
def test_both_operands_have_statistics_of_their_own(scale):
  """Against fake quantization in float64."""
  rng = np.random.default_rng(0)
  x, w = rng.normal(size=(2, 3, 5)), 7 * rng.normal(size=(2, 5, 4))
  x, w = x.astype(np.float32), w.astype(np.float32)
  product = products.dot_general(x, w, (((2,), (1,)), ((0,), (0,))))
  formats = LayerFormats(weights=get_format('int4'), activations=get_format('int5'))
  zero = Statistics(jnp.zeros(()), jnp.zeros(()))

  def compute(statistics):
    return quantized_pair_product(
      product, x, w, formats, statistics, ('absmax', 'rms'), 0.5, scale
    )

  y, statistics = compute(PairStatistics(zero, zero))
  rounded_x = rounded(x, 'int5', 2 if scale == 'token' else None, 'absmax')
  if scale == 'tensor':
    np.testing.assert_allclose(y, x @ w, rtol=1e-4, atol=1e-4)  # nothing is known yet
  y, _ = compute(statistics)
  expected = rounded_x @ rounded(w, 'int4')
  np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


def rounded(array, name, axes=None, calibration='rms'):
  array = array.astype(np.float64)
  absmax = np.abs(array).max(axes, keepdims=True)
  mean_square = np.mean(array**2, axes, keepdims=True)
  return references.fake_quantize(array, name, mean_square, absmax, calibration)[0]


def test_pairs_are_activations_in_a_search():
  layers = make_searchable(LinenAttention(), True).coverage(inputs(1)).layers
  index = [layer.path for layer in layers].index('attention/qk')
  space = build_space(layers, ('int4', 'int8'), 'weights')
  assert (space.weights[index], space.activations[index]) == ('float32', 'float32')
  space = build_space(layers, ('int4', 'int8'), 'separate')
  assert len(space.decisions) == 2 * len(layers)
  choices = jnp.zeros(len(space.decisions), jnp.int32)
  late = space.bind(choices, quantize_activations=False, quantize_weights=True)
  unquantized = [
    get_format('float32').max == late[path].formats.weights.max
    for path in ('attention/qk', 'attention/query')
  ]
  assert unquantized == [True, False]


def test_an_own_network_is_searched_with_the_products_inside_its_attention():
  batch = {'image': inputs(8), 'label': np.arange(8 * LENGTH).reshape(8, LENGTH) % 2}
  result = fliqs_jax.search(
    NnxAttention(nnx.Rngs(0)),
    [batch],
    [batch],
    num_steps=6,
    formats='int4,int8',
    target_scale=2.0,
    attention_products=True,
  )
  assert {'attention/qk', 'attention/av'} < set(result.formats)
  assert np.isfinite(result.model(batch['image'])).all()
  with pytest.raises(ConfigError, match='attention/qk.*multiplies two activations'):
    result.export('onnx', f'{result.workdir}/onnx')
  report = result.export('stablehlo', f'{result.workdir}/stablehlo')
  assert report['agreement'] == 1.0


def test_causal_attention_sees_no_later_token():
  x = inputs(1)
  model = make_searchable(LinenOwn(), True, activation_scale='token')
  formats = bound(model.coverage(x).layers, 'int4')
  variables = jax.jit(model.init)(jax.random.key(0), x)
  train = lambda x: model.apply({**variables, **formats}, x, mutable=[QUANT_STATS])
  _, updated = jax.jit(train)(x)
  apply = jax.jit(lambda x: model.apply({**variables, **updated, **formats}, x))
  changed = x.copy()
  changed[:, -1] *= 9
  before, after = apply(x), apply(changed)
  np.testing.assert_array_equal(before[:, :-1], after[:, :-1])
  assert np.abs(before - after).max() > 0
