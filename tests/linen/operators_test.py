"""Quantized operators against independent fake quantization in float64."""

import functools

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references

from fliqs_jax.layers.variables import FORMATS, LAYER_FORMATS, QUANT_STATS
from fliqs_jax.linen import operators as layers
from fliqs_jax.numerics import formats
from fliqs_jax.numerics.formats import get_format
from fliqs_jax.numerics.products import LayerFormats

# Constructor, input shape, the axes of the kernel that one output channel spans.
# Inputs are tiny: compilation is what takes time.
LAYERS = {
    'conv': (functools.partial(nn.Conv, 5, (3, 3)), (2, 6, 6, 3), (0, 1, 2)),
    'strides': (
        functools.partial(nn.Conv, 4, (3, 3), strides=2, padding=1),
        (2, 7, 6, 3), (0, 1, 2),
    ),
    'dilation': (
        functools.partial(nn.Conv, 4, (3, 3), kernel_dilation=2),
        (1, 7, 7, 2), (0, 1, 2),
    ),
    'input_dilation': (
        functools.partial(nn.Conv, 3, (3, 3), input_dilation=2, padding=1),
        (1, 4, 4, 2), (0, 1, 2),
    ),
    'groups': (
        functools.partial(nn.Conv, 6, (3, 3), feature_group_count=2),
        (2, 5, 5, 4), (0, 1, 2),
    ),
    'depthwise': (
        functools.partial(nn.Conv, 4, (3, 3), feature_group_count=4),
        (2, 5, 5, 4), (0, 1, 2),
    ),
    'one_dimension': (
        functools.partial(nn.Conv, 4, (3,), padding='VALID'), (2, 9, 3), (0, 1)
    ),
    'dense': (functools.partial(nn.Dense, 5), (2, 3, 7), (0,)),
    'several_axes': (
        functools.partial(nn.DenseGeneral, (3, 4), axis=(-2, -1)), (5, 6, 7), (0, 1)
    ),
    'inner_axis': (functools.partial(nn.DenseGeneral, 4, axis=1), (2, 5, 3), (0,)),
    'batch_axes': (
        functools.partial(nn.DenseGeneral, (2, 4), axis=(-1,), batch_dims=(0, 1)),
        (2, 3, 4, 5), (2,),
    ),
}  # fmt: skip
PAIRS = [  # of weights and activations
  ('int4', 'int4'),
  ('int2', 'int8'),
  ('e4m3', 'e5m2'),
  ('e2m1', 'int3'),
  ('bf16', 'e3m2'),
  ('int5', 'float32'),
]


class _Case:
  """A layer with hooks, its variables, and its plain twin."""

  def __init__(self, name, seed=0, dtype=None, **attributes):
    constructor, shape, self.contracted = LAYERS[name]
    is_conv = constructor.func is nn.Conv
    hooks = layers.conv_hooks if is_conv else layers.dense_hooks
    self.operator = 'QuantizedConv_0' if is_conv else 'QuantizedDotGeneral_0'
    self.layer = constructor(dtype=dtype, **hooks(**attributes))
    self.apply = jax.jit(self.layer.apply, static_argnames='mutable')
    self.plain = constructor(dtype=dtype)
    self.exact = constructor(dtype=jnp.float64, param_dtype=jnp.float64)
    rng = np.random.default_rng(seed)
    self.x = rng.normal(0.1, 0.7, shape).astype(np.float32)
    variables = self.layer.init(jax.random.key(seed), self.x)
    self.params = jax.tree.map(
      lambda a: rng.normal(0, 0.3, a.shape).astype(np.float32), variables['params']
    )
    self.zero_stats = variables[QUANT_STATS]
    # Not those of x itself: clipping must be by the moving averages.
    self.mean_square, self.absmax = np.float32(0.4), np.float32(1.7)
    self.stats = {
      self.operator: {'mean_square': self.mean_square, 'absmax': self.absmax}
    }

  def variables(self, weights, activations, params=None, stats=None):
    bound = LayerFormats(get_format(weights), get_format(activations))
    return {
      'params': self.params if params is None else params,
      QUANT_STATS: self.stats if stats is None else stats,
      FORMATS: {self.operator: {LAYER_FORMATS: bound}},
    }

  def fake_weights(self, name):
    kernel = self.params['kernel'].astype(np.float64)
    mean_square = np.mean(kernel**2, axis=self.contracted, keepdims=True)
    absmax = np.abs(kernel).max(axis=self.contracted, keepdims=True)
    return references.fake_quantize(kernel, name, mean_square, absmax)

  def clear_of_threshold(self, name):
    if name in ('bf16', 'float32'):
      return np.ones(self.params['kernel'].shape, bool)
    kernel = self.params['kernel'].astype(np.float64)
    mean_square = np.mean(kernel**2, axis=self.contracted, keepdims=True)
    absmax = np.abs(kernel).max(axis=self.contracted, keepdims=True)
    limit = references.threshold(name, mean_square, absmax)
    return np.abs(np.abs(kernel) - limit) > 1e-6 * limit

  def fake_activations(self, name):
    return references.fake_quantize(self.x, name, self.mean_square, self.absmax)

  def exact_forward(self, x, kernel):
    with jax.enable_x64(True):
      params = {**self.params, 'kernel': kernel}
      params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), params)
      return np.asarray(self.exact.apply({'params': params}, jnp.asarray(x)))

  def exact_gradients(self, weights, activations, cotangent):
    """Of the straight-through estimator, written with `stop_gradient`."""

    def straight_through(value, fake, inside):
      passed = jnp.where(inside, value, 0)
      return passed + jax.lax.stop_gradient(fake - passed)

    with jax.enable_x64(True):

      def loss(params, x):
        kernel = straight_through(params['kernel'], *self.fake_weights(weights))
        x = straight_through(x, *self.fake_activations(activations))
        y = self.exact.apply({'params': {**params, 'kernel': kernel}}, x)
        return jnp.sum(y * cotangent)

      params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), self.params)
      gradients = jax.grad(loss, (0, 1))(params, jnp.asarray(self.x, jnp.float64))
      return jax.tree.map(np.asarray, gradients)


@functools.cache
def _case(name, **attributes):
  return _Case(name, **attributes)


def _assert_close(actual, expected):
  """Equal up to the roundings of float32 sums of some tens of terms."""
  expected = np.asarray(expected, np.float64)
  np.testing.assert_allclose(
    np.asarray(actual, np.float64),
    expected,
    rtol=1e-5,
    atol=2e-6 * np.abs(expected).max(),
  )


@pytest.mark.parametrize('name', LAYERS)
def test_forward_equals_fake_quantization_in_float64(name):
  case = _case(name)
  for weights, activations in PAIRS:
    actual = case.apply(case.variables(weights, activations), case.x)
    expected = case.exact_forward(
      case.fake_activations(activations)[0], case.fake_weights(weights)[0]
    )
    assert actual.dtype == np.float32
    _assert_close(actual, expected)
  assert case.apply._cache_size() == 1  # formats are data


@pytest.mark.parametrize('name', LAYERS)
def test_gradients_equal_the_straight_through_estimator(name):
  case = _case(name)

  @jax.jit
  def gradients(variables, x, cotangent):
    def loss(params, x):
      y = case.apply({**variables, 'params': params}, x)
      return jnp.sum(y * cotangent)

    return jax.grad(loss, (0, 1))(variables['params'], x)

  shape = jax.eval_shape(case.plain.apply, {'params': case.params}, case.x).shape
  cotangent = np.random.default_rng(1).normal(size=shape).astype(np.float32)
  for weights, activations in PAIRS:
    actual = gradients(case.variables(weights, activations), case.x, cotangent)
    expected = case.exact_gradients(weights, activations, cotangent)
    # A largest weight that is itself the threshold has a test of its own.
    clear = case.clear_of_threshold(weights)
    actual[0]['kernel'] = np.where(clear, actual[0]['kernel'], 0)
    expected[0]['kernel'] = np.where(clear, expected[0]['kernel'], 0)
    jax.tree.map(_assert_close, actual, expected)


@pytest.mark.parametrize('calibration', ['rms', 'absmax'])
def test_calibration_of_the_operator(calibration):
  case = _Case('conv', calibration=calibration)
  actual = case.apply(case.variables('int3', 'int3'), case.x)
  kernel = case.params['kernel'].astype(np.float64)
  mean_square = np.mean(kernel**2, axis=(0, 1, 2), keepdims=True)
  absmax = np.abs(kernel).max(axis=(0, 1, 2), keepdims=True)
  w, _ = references.fake_quantize(kernel, 'int3', mean_square, absmax, calibration)
  x, _ = references.fake_quantize(
    case.x, 'int3', case.mean_square, case.absmax, calibration
  )
  _assert_close(actual, case.exact_forward(x, w))


@pytest.mark.parametrize('name', LAYERS)
def test_float32_format_equals_the_plain_layer(name):
  case = _case(name)
  variables = case.variables('float32', 'float32')

  def value_and_gradients(layer, rest):
    def loss(params, x):
      y = layer.apply({'params': params, **rest}, x)
      return jnp.sum(jnp.sin(y)), y

    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(case.params, case.x)

  rest = {k: v for k, v in variables.items() if k != 'params'}
  (_, actual), actual_gradients = value_and_gradients(case.layer, rest)
  (_, expected), expected_gradients = value_and_gradients(case.plain, {})
  np.testing.assert_array_equal(actual, expected)
  # The compiler may order the sums of the two backward passes otherwise.
  jax.tree.map(_assert_close, actual_gradients, expected_gradients)


@pytest.mark.parametrize('dtype', [None, jnp.bfloat16])
@pytest.mark.parametrize('name', LAYERS)
def test_without_formats_equals_the_plain_layer(name, dtype):
  case = _case(name, dtype=dtype)
  unbound = {'params': case.params, QUANT_STATS: case.stats}
  actual = case.apply(unbound, case.x)
  expected = case.plain.apply({'params': case.params}, case.x)
  assert actual.dtype == expected.dtype
  np.testing.assert_array_equal(
    np.asarray(actual, np.float32), np.asarray(expected, np.float32)
  )


# bfloat16


@pytest.mark.parametrize('name', references.LOW_PRECISION)
def test_bfloat16_products_equal_float32_products_of_the_same_codes(name):
  # One input feature: no sum whose order could matter, whatever the codes' range.
  _assert_bfloat16_equals_float32(name, features=1)


@pytest.mark.parametrize(
  'name',
  [*formats.INTEGER_NAMES, 'e1m6', 'e2m1', 'e2m3', 'e2m5', 'e3m0', 'e3m2', 'e3m3'],
)
def test_bfloat16_sums_equal_float32_sums_of_the_same_codes(name):
  # Codes in these formats are at most 9 bits of fixed point: float32 sums 8 exactly.
  codes = references.positive_codes(name)
  products = codes[-1] ** 2 / codes[1] ** 2
  assert 8 * products < 2**24
  _assert_bfloat16_equals_float32(name, features=8)


@functools.cache
def _dense_applies():
  hooks = layers.dense_hooks()
  return [
    jax.jit(nn.Dense(5, use_bias=False, dtype=dtype, **hooks).apply)
    for dtype in (jnp.bfloat16, jnp.float32)
  ]


def _assert_bfloat16_equals_float32(name, features):
  rng = np.random.default_rng(features)
  # Numbers of bfloat16, so that both layers see the same activations.
  x = np.asarray(jnp.asarray(rng.normal(size=(50, features)), jnp.bfloat16), np.float32)
  params = {'kernel': rng.normal(size=(features, 5)).astype(np.float32)}
  stats = {'mean_square': np.float32(1), 'absmax': np.float32(3)}
  bound = LayerFormats(get_format(name), get_format(name))
  variables = {
    'params': params,
    QUANT_STATS: {'QuantizedDotGeneral_0': stats},
    FORMATS: {'QuantizedDotGeneral_0': {LAYER_FORMATS: bound}},
  }
  low, high = (apply(variables, x) for apply in _dense_applies())
  assert low.dtype == jnp.bfloat16 and high.dtype == jnp.float32
  assert np.count_nonzero(np.asarray(high)) > high.size / 4
  np.testing.assert_array_equal(
    np.asarray(low, np.float32), np.asarray(high.astype(jnp.bfloat16), np.float32)
  )


@pytest.mark.parametrize('kind', ['dense', 'conv'])
def test_weights_are_quantized_from_float32_in_bfloat16_compute(kind):
  # One input of 1: the output is the weights' scaled codes.
  channels = 400
  rng = np.random.default_rng(0)
  if kind == 'dense':
    layer = nn.Dense(channels, False, dtype=jnp.bfloat16, **layers.dense_hooks())
    x, kernel_shape = np.eye(8, dtype=np.float32), (8, channels)
  else:
    layer = nn.Conv(
      channels, (1, 1), use_bias=False, dtype=jnp.bfloat16, **layers.conv_hooks()
    )
    x, kernel_shape = np.eye(8, dtype=np.float32)[:, None, None], (1, 1, 8, channels)
  params = layer.init(jax.random.key(0), x)['params']
  assert params['kernel'].dtype == np.float32
  assert params['kernel'].shape == kernel_shape
  kernel = rng.normal(size=kernel_shape).astype(np.float32)
  operator = 'QuantizedDotGeneral_0' if kind == 'dense' else 'QuantizedConv_0'
  bound = LayerFormats(get_format('int8'), get_format('float32'))
  y = jax.jit(layer.apply)(
    {
      'params': {'kernel': kernel},
      QUANT_STATS: {operator: {'mean_square': 1.0, 'absmax': 1.0}},
      FORMATS: {operator: {LAYER_FORMATS: bound}},
    },
    x,
  )
  assert y.dtype == jnp.bfloat16

  flat = kernel.reshape(8, channels).astype(np.float64)
  absmax, mean_square = np.abs(flat).max(axis=0), np.mean(flat**2, axis=0)
  scale = references.threshold('int8', mean_square, absmax) / 127
  # bfloat16 outputs are precise to 2^-9 of at most 127: codes can be read off.
  actual = np.rint(np.asarray(y, np.float64).reshape(8, channels) / scale)
  expected = references.cast(flat / scale, 'int8')
  rounded_first = flat.astype(jnp.bfloat16).astype(np.float64)
  assert np.any(references.cast(rounded_first / scale, 'int8') != expected)
  np.testing.assert_array_equal(actual, expected)


def test_bfloat16_gradients_have_the_parameters_dtype():
  case = _case('conv', dtype=jnp.bfloat16)

  @jax.jit
  def gradient(variables):
    def loss(params):
      y = case.apply({**variables, 'params': params}, case.x)
      return jnp.sum(jnp.square(y.astype(jnp.float32)))

    return jax.grad(loss)(variables['params'])

  for name in ('int4', 'e4m3', 'bf16', 'float32', 'e7m0'):
    for g in jax.tree.leaves(gradient(case.variables(name, name))):
      assert g.dtype == np.float32
      assert np.isfinite(g).all() and np.any(g)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_the_widest_exponents_stay_finite(dtype):
  # Products of two codes of e7m0 as it is would overflow float32.
  case = _case('conv', dtype=dtype)

  @jax.jit
  def forward_and_backward(variables, x):
    def loss(params, x):
      y = case.apply({**variables, 'params': params}, x)
      return jnp.sum(y.astype(jnp.float32) ** 2), y

    return jax.value_and_grad(loss, (0, 1), has_aux=True)(variables['params'], x)

  for scale in np.float32([1e-3, 1, 1e3]):
    x = scale * case.x
    stats = {case.operator: {'mean_square': np.mean(x**2), 'absmax': np.abs(x).max()}}
    params = {**case.params, 'kernel': scale * case.params['kernel']}
    (_, y), gradients = forward_and_backward(
      case.variables('e7m0', 'e7m0', params, stats), x
    )
    for array in jax.tree.leaves((y, gradients)):
      assert np.isfinite(np.asarray(array, np.float32)).all()
    assert np.any(np.asarray(y, np.float32))


def test_the_widest_exponents_are_scaled_as_others_are():
  case = _case('dense')
  actual = case.apply(case.variables('e7m0', 'e7m0'), case.x)
  expected = case.exact_forward(
    case.fake_activations('e7m0')[0], case.fake_weights('e7m0')[0]
  )
  _assert_close(actual, expected)


def test_the_largest_weight_of_a_channel_receives_its_gradient():
  # A channel of a depthwise convolution has 9 weights, seldom one beyond the
  # threshold: the threshold is then absmax itself, and the largest is not outside.
  operator = 'QuantizedDotGeneral_0'
  layer = nn.Dense(200, use_bias=False, **layers.dense_hooks(calibration='absmax'))
  kernel = np.random.default_rng(0).normal(size=(9, 200)).astype(np.float32)

  @jax.jit
  def gradient(kernel, bound):
    def loss(kernel):
      variables = {
        'params': {'kernel': kernel},
        QUANT_STATS: {operator: {'mean_square': 1.0, 'absmax': 1.0}},
        FORMATS: {operator: {LAYER_FORMATS: bound}},
      }
      return jnp.sum(layer.apply(variables, jnp.ones((1, 9))))

    return jax.grad(loss)(kernel)

  for name in references.LOW_PRECISION:
    bound = LayerFormats(get_format(name), get_format('float32'))
    passed = np.asarray(gradient(kernel, bound))
    assert passed.all(), f'{name}: {np.sum(passed == 0)} of 200 channels'


# Statistics


def test_statistics_start_at_the_first_batch_and_then_average():
  momentum = 0.9
  case = _case('conv', momentum=momentum)
  rng = np.random.default_rng(3)
  batches = [rng.normal(0, s, case.x.shape).astype(np.float32) for s in (1.0, 3.0, 0.2)]
  stats, expected = case.zero_stats, None
  assert jax.tree.leaves(stats) == [0, 0]
  for x in batches:
    variables = case.variables('int4', 'int8', stats=stats)
    _, updated = case.apply(variables, x, mutable=(QUANT_STATS,))
    stats = updated[QUANT_STATS]
    batch = np.array([np.mean(np.float64(x) ** 2), np.abs(x).max()])
    expected = (
      batch if expected is None else momentum * expected + (1 - momentum) * batch
    )
    actual = stats[case.operator]
    np.testing.assert_allclose(
      [actual['mean_square'], actual['absmax']], expected, rtol=1e-6
    )


def test_the_default_momentum_is_as_documented():
  case = _case('dense')
  _, updated = case.apply(
    case.variables('int4', 'int4'), case.x, mutable=(QUANT_STATS,)
  )
  np.testing.assert_allclose(
    updated[QUANT_STATS][case.operator]['absmax'],
    0.95 * case.absmax + 0.05 * np.abs(case.x).max(),
    rtol=1e-6,
  )


@pytest.mark.parametrize('mutable', [False, ('batch_stats',)])
def test_statistics_stay_where_they_are_immutable(mutable):
  case = _case('conv')
  result = case.apply(case.variables('int4', 'int4'), case.x, mutable=mutable)
  y = result[0] if mutable else result
  if mutable:
    assert QUANT_STATS not in result[1]
  _assert_close(y, case.apply(case.variables('int4', 'int4'), case.x))


def test_an_update_does_not_touch_its_own_forward_pass():
  # A step's thresholds are those of the steps before.
  case = _case('conv')
  variables = case.variables('int4', 'int4')
  y, _ = case.apply(variables, case.x, mutable=(QUANT_STATS,))
  _assert_close(y, case.apply(variables, case.x))


@pytest.mark.parametrize('mutable', [False, (QUANT_STATS,)])
@pytest.mark.parametrize('name', ['conv', 'dense'])
def test_activations_stay_unquantized_until_some_were_seen(name, mutable):
  case = _case(name)
  variables = case.variables('int3', 'int2', stats=case.zero_stats)
  y = case.apply(variables, case.x, mutable=mutable)
  y = y[0] if mutable else y
  _assert_close(y, case.exact_forward(case.x, case.fake_weights('int3')[0]))


def test_a_batch_of_zeros_is_not_a_first_batch():
  case = _case('conv')
  variables = case.variables('int3', 'int2', stats=case.zero_stats)
  zeros = np.zeros_like(case.x)
  y, updated = case.apply(variables, zeros, mutable=(QUANT_STATS,))
  assert np.isfinite(y).all()
  assert jax.tree.leaves(updated[QUANT_STATS]) == [0, 0]


def test_initialisation_leaves_statistics_at_zero():
  case = _case('conv')
  variables = case.layer.init(jax.random.key(0), case.x)
  assert set(variables) == {'params', QUANT_STATS}
  assert all(leaf == 0 for leaf in jax.tree.leaves(variables[QUANT_STATS]))


def test_initial_parameters_are_those_of_the_plain_layer():
  case = _case('conv')
  hooked = case.layer.init(jax.random.key(7), case.x)['params']
  plain = case.plain.init(jax.random.key(7), case.x)['params']
  jax.tree.map(np.testing.assert_array_equal, hooked, plain)
