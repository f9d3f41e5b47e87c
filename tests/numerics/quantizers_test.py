"""Quantizers: rounding bit by bit against ml_dtypes and numpy; thresholds, scales."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
from hypothesis import strategies as st

from fliqs_jax.numerics import formats, quantizers
from fliqs_jax.numerics.formats import get_format
from fliqs_jax.numerics.quantizers import round_to_format

NARROW = tuple(n for n in formats.NAMES if n != 'float32')
NUM_HYPOTHESIS = 16  # numbers in one example, so that one shape is compiled

jitted_round = jax.jit(round_to_format)


def _assert_same_bits(actual, expected):
  """NaNs may differ in their payload, zeros may not in their sign."""
  actual, expected = np.asarray(actual), np.asarray(expected, np.float32)
  assert actual.dtype == np.float32
  np.testing.assert_array_equal(np.isnan(actual), np.isnan(expected))
  number = ~np.isnan(expected)
  np.testing.assert_array_equal(
    actual[number].view(np.uint32), expected[number].view(np.uint32)
  )


def _critical_values(name):
  """Codes, midpoints, both with their neighbours in float32, and what is special."""
  codes = references.positive_codes(name)
  middle = (codes[1:] + codes[:-1]) / 2
  exact = np.concatenate([codes, middle]).astype(np.float32)
  np.testing.assert_array_equal(exact, np.concatenate([codes, middle]))
  info = np.finfo(np.float32)
  special = np.array(
    [np.inf, np.nan, info.max, info.tiny, info.smallest_subnormal], np.float32
  )
  # From half of the largest code to past it, where float32 has such values.
  factors = np.float32([0.50005, 0.625, 0.75, 0.875, 0.99995])
  beyond = factors * exact[len(codes) - 1]
  if name != 'bf16':
    beyond = np.concatenate([beyond, 2 * beyond])
  positive = np.concatenate(
    [
      exact,
      np.nextafter(exact, np.float32(np.inf)),
      np.nextafter(exact, np.float32(-np.inf)),
      beyond,
      special,
    ]
  )
  return np.concatenate([positive, -positive])


def _random_values(name, size=500_000):
  """Any bit pattern, and magnitudes about the format's own."""
  rng = np.random.default_rng(formats.NAMES.index(name))
  patterns = rng.integers(0, 2**32, size, np.uint32).view(np.float32)
  codes = references.positive_codes(name)
  low, high = np.log2(codes[1]) - 2, np.log2(codes[-1]) + 1
  exponents = rng.uniform(low, min(high, 127.9), size)
  magnitudes = np.exp2(exponents) * rng.choice([-1, 1], size)
  return np.concatenate([patterns, magnitudes.astype(np.float32)])


@pytest.mark.parametrize('name', NARROW)
def test_rounding_at_every_code_and_midpoint(name):
  x = _critical_values(name)
  _assert_same_bits(jitted_round(x, get_format(name)), references.cast(x, name))


@pytest.mark.parametrize('name', NARROW)
def test_rounding_of_a_million_random_values(name):
  x = _random_values(name)
  _assert_same_bits(jitted_round(x, get_format(name)), references.cast(x, name))


@pytest.mark.parametrize('name', sorted({*references.ML_DTYPES} - {'bf16'}))
def test_reference_by_enumeration_equals_ml_dtypes(name):
  # So that it can be trusted for the formats of which ml_dtypes has no type.
  x = np.concatenate([_critical_values(name), _random_values(name, 10_000)])
  _assert_same_bits(
    references.nearest_code(x, name).astype(np.float32), references.cast(x, name)
  )


def test_float32_is_the_identity_on_all_bit_patterns():
  # Every sign, exponent and upper mantissa, with lower halves at the edges and random.
  upper = np.arange(2**16, dtype=np.uint32) << 16
  random = np.random.default_rng(0).integers(0, 2**16, 12, np.uint32)
  for lower in [0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, *random]:
    x = (upper | np.uint32(lower)).view(np.float32)
    _assert_same_bits(jitted_round(x, get_format('float32')), x)


@pytest.mark.parametrize('name', formats.NAMES)
def test_signed_zeros_infinities_and_nan(name):
  x = np.array([0.0, -0.0, np.inf, -np.inf, np.nan], np.float32)
  largest = np.inf if name == 'float32' else references.positive_codes(name)[-1]
  expected = np.array([0.0, -0.0, largest, -largest, np.nan], np.float32)
  _assert_same_bits(jitted_round(x, get_format(name)), expected)


def test_one_trace_serves_all_formats():
  traces = 0

  @jax.jit
  def counted(x, format):
    nonlocal traces
    traces += 1
    return round_to_format(x, format)

  x = np.linspace(-9, 9, 101, dtype=np.float32)
  for name in formats.NAMES:
    _assert_same_bits(counted(x, get_format(name)), references.cast(x, name))
  assert traces == 1


@pytest.mark.parametrize('name', formats.NAMES)
def test_jit_equals_eager(name):
  if name == 'float32':
    x = np.random.default_rng(0).integers(0, 2**32, 1000, np.uint32).view(np.float32)
  else:
    x = _random_values(name, 500)
  with jax.disable_jit():
    eager = round_to_format(x, get_format(name))
  _assert_same_bits(jitted_round(x, get_format(name)), eager)
  _assert_same_bits(round_to_format(x, get_format(name)), eager)


def test_stacked_formats_through_vmap():
  x = np.random.default_rng(0).normal(0, 4, 1000).astype(np.float32)
  rounded = jax.jit(jax.vmap(round_to_format, (None, 0)))(
    x, formats.stack(formats.NAMES)
  )
  for row, name in zip(rounded, formats.NAMES, strict=True):
    _assert_same_bits(row, references.cast(x, name))


def test_formats_broadcast_against_values():
  names = ('int4', 'e2m1', 'bf16', 'float32', 'e5m2')
  x = np.random.default_rng(1).normal(0, 4, (200, len(names))).astype(np.float32)
  rounded = round_to_format(x, formats.stack(names))
  for column, name in enumerate(names):
    _assert_same_bits(rounded[:, column], references.cast(x[:, column], name))


@pytest.mark.parametrize('name', formats.NAMES)
@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16])
def test_shorter_dtypes_are_kept(name, dtype):
  x = jnp.asarray(np.random.default_rng(2).normal(0, 4, 1000), dtype)
  rounded = round_to_format(x, get_format(name))
  assert rounded.dtype == dtype and rounded.shape == x.shape
  reference = references.cast(np.asarray(x, np.float32), name)
  np.testing.assert_array_equal(
    np.asarray(rounded, np.float32), np.asarray(reference.astype(dtype), np.float32)
  )


def _hypothesis_case(test):
  floats = st.floats(width=32, allow_nan=False)
  values = st.lists(floats, min_size=NUM_HYPOTHESIS, max_size=NUM_HYPOTHESIS)
  settings = hypothesis.settings(max_examples=300, deadline=None, derandomize=True)
  return settings(hypothesis.given(values, st.sampled_from(formats.NAMES))(test))


@_hypothesis_case
def test_rounding_is_idempotent(values, name):
  once = jitted_round(np.float32(values), get_format(name))
  _assert_same_bits(jitted_round(once, get_format(name)), once)


@_hypothesis_case
def test_rounding_is_monotone(values, name):
  rounded = np.asarray(jitted_round(np.sort(np.float32(values)), get_format(name)))
  # Not by np.diff, in which infinities cancel.
  assert (rounded[1:] >= rounded[:-1]).all()


@_hypothesis_case
def test_rounding_is_symmetric(values, name):
  x, f = np.float32(values), get_format(name)
  _assert_same_bits(jitted_round(-x, f), -np.asarray(jitted_round(x, f)))


@_hypothesis_case
def test_rounding_is_to_a_code_and_none_is_nearer(values, name):
  x = np.float32(values)
  _assert_same_bits(jitted_round(x, get_format(name)), references.cast(x, name))


# Thresholds and scales.


def _statistics(x):
  x = np.asarray(x, np.float64)
  return np.float32(np.mean(x**2)), np.float32(np.abs(x).max())


@jax.jit
def _dequantize(quantizer, x):
  return quantizer.codes(x) * quantizer.scale


@pytest.fixture(scope='module')
def normal_sample():
  return np.random.default_rng(0).normal(size=1_000_000).astype(np.float32)


@pytest.mark.parametrize('name', references.LOW_PRECISION)
def test_no_other_threshold_has_a_lower_error(name, normal_sample):
  f = get_format(name)

  def error(threshold):
    # absmax calibration takes the threshold as it is given.
    quantizer = quantizers.calibrate(f, 1.0, np.float32(threshold), 'absmax')
    difference = np.asarray(_dequantize(quantizer, normal_sample)) - normal_sample
    return np.mean(np.square(difference, dtype=np.float64))

  # The distribution's own statistics, whose largest value is infinite.
  threshold = quantizers.clipping_threshold(f, np.float32(1), np.float32(np.inf))
  best = error(threshold)
  # Octaves of a wide float agree to 1e-4 (clipping_thresholds.optimal_threshold).
  for factor in (0.8, 1.2):
    assert best <= error(factor * threshold) * (1 + 1e-4)


@pytest.mark.parametrize('name', references.LOW_PRECISION)
@pytest.mark.parametrize('calibration', quantizers.CALIBRATIONS)
def test_scale_maps_the_threshold_to_the_largest_code(name, calibration):
  f = get_format(name)
  for seed in range(20):
    rng = np.random.default_rng(seed)
    x = rng.normal(0, np.exp(rng.uniform(-9, 9)), 500)
    mean_square, absmax = _statistics(x)
    limit = references.threshold(name, mean_square, absmax, calibration)
    quantizer = quantizers.calibrate(f, mean_square, absmax, calibration)
    np.testing.assert_allclose(
      quantizers.clipping_threshold(f, mean_square, absmax, calibration), limit, 1e-6
    )
    np.testing.assert_allclose(quantizer.scale * quantizer.format.max, limit, 1e-6)
    np.testing.assert_allclose(
      _dequantize(quantizer, np.float32(2 * limit)), limit, 1e-6
    )


@pytest.mark.parametrize('name', references.LOW_PRECISION)
def test_dequantized_values_are_the_nearest_ones(name):
  for seed in range(5):
    x = np.random.default_rng(seed).normal(0, 0.3, 20_000).astype(np.float32)
    mean_square, absmax = _statistics(x)
    quantizer = quantizers.calibrate(get_format(name), mean_square, absmax)
    expected, inside = references.fake_quantize(x, name, mean_square, absmax)
    # A float32 scale may be off by roundings, and take x / scale over a tie.
    limit = references.threshold(name, mean_square, absmax)
    codes = references.positive_codes(name) * limit / references.largest(name)
    ties = (codes[1:] + codes[:-1]) / 2
    nearest_tie = np.abs(np.abs(x, dtype=np.float64)[:, None] - ties).min(axis=1)
    clear = nearest_tie > 1e-6 * np.abs(x)
    assert clear.mean() > 0.99
    actual = np.asarray(_dequantize(quantizer, x))
    np.testing.assert_allclose(actual[clear], expected[clear], rtol=1e-6, atol=0)
    at_threshold = np.abs(np.abs(x) - limit) < 1e-6 * limit
    np.testing.assert_array_equal(
      np.asarray(quantizer.inside(x))[~at_threshold], inside[~at_threshold]
    )


@pytest.mark.parametrize('name', references.LOW_PRECISION)
def test_codes_are_those_of_the_format_up_to_a_power_of_two(name):
  f = get_format(name)
  # A scale of exactly one code, so that ties are met exactly.
  x = _critical_values(name)
  x = x[np.isfinite(x) & (np.abs(x) < 2.0**60)]
  largest = references.largest(name)
  quantizer = quantizers.calibrate(f, 1.0, np.float32(largest), 'absmax')
  shift = quantizer.scale
  assert np.log2(shift) == np.round(np.log2(shift))
  # Values that fall below float32's normals in units of codes are flushed.
  x = x[(np.abs(x) / shift >= np.finfo(np.float32).tiny) | (x == 0)]
  np.testing.assert_array_equal(
    np.asarray(quantizer.codes(x)) * shift, references.cast(x, name)
  )


@pytest.mark.parametrize('name', references.LOW_PRECISION)
def test_codes_and_their_products_fit_the_matrix_unit(name):
  quantizer = quantizers.calibrate(get_format(name), 1.0, np.float32(3.0), 'absmax')
  codes = np.asarray(quantizer.codes(_random_values(name, 2000)[2000:]))
  np.testing.assert_array_equal(codes, codes.astype(jnp.bfloat16).astype(np.float32))
  products = np.outer(codes[:500], codes[:500]).astype(np.float64)
  exact = np.outer(codes[:500].astype(np.float64), codes[:500].astype(np.float64))
  np.testing.assert_array_equal(products, exact)


@pytest.mark.parametrize('name', ['bf16', 'float32'])
@pytest.mark.parametrize('calibration', quantizers.CALIBRATIONS)
def test_wide_formats_are_not_scaled(name, calibration):
  x = np.random.default_rng(0).normal(0, 100, 1000).astype(np.float32)
  quantizer = quantizers.calibrate(get_format(name), *_statistics(x), calibration)
  assert quantizer.scale == 1
  _assert_same_bits(quantizer.codes(x), references.cast(x, name))
  assert np.asarray(quantizer.inside(x)).all()


@pytest.mark.parametrize('name', formats.NAMES)
@pytest.mark.parametrize('calibration', quantizers.CALIBRATIONS)
def test_a_tensor_of_zeros(name, calibration):
  zero = np.zeros((), np.float32)
  quantizer = quantizers.calibrate(get_format(name), zero, zero, calibration)
  assert quantizer.scale == 1
  _assert_same_bits(quantizer.codes(np.zeros(3, np.float32)), np.zeros(3))
  assert np.asarray(quantizer.inside(np.zeros(3, np.float32))).all()


@pytest.mark.parametrize('name', references.LOW_PRECISION)
@pytest.mark.parametrize('calibration', quantizers.CALIBRATIONS)
@pytest.mark.parametrize('exponent', [-149, -140, -126, -110, -70, 60, 120])
def test_extreme_tensors_stay_finite_and_in_range(name, calibration, exponent):
  x = np.ldexp(np.float32([1, -0.7, 0.4]), exponent).astype(np.float32)
  with np.errstate(over='ignore'):
    mean_square = np.mean(np.square(x))  # in float32: it may overflow or underflow
  quantizer = quantizers.calibrate(
    get_format(name), mean_square, np.abs(x).max(), calibration
  )
  values = np.asarray(_dequantize(quantizer, x))
  assert np.isfinite(values).all() and np.isfinite(quantizer.scale)
  assert quantizer.scale > 0
  if exponent > -120:  # else the scale is the smallest normal number
    assert (np.abs(values) <= np.abs(x).max() * (1 + 1e-6)).all()


@pytest.mark.parametrize('name', references.LOW_PRECISION)
def test_absmax_calibration_passes_every_gradient(name):
  # "Nothing is clipped", the largest value itself least of all.
  for seed in range(200):
    x = np.random.default_rng(seed).normal(size=9).astype(np.float32)
    quantizer = quantizers.calibrate(get_format(name), *_statistics(x), 'absmax')
    assert np.asarray(quantizer.inside(x)).all(), f'seed {seed}: {x}'


@pytest.mark.parametrize('name', references.LOW_PRECISION)
def test_scales_per_channel(name):
  x = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
  x *= np.float32([0.01, 1, 0, 300])
  mean_square = np.mean(x**2, axis=0, keepdims=True)
  absmax = np.abs(x).max(axis=0, keepdims=True)
  quantizer = quantizers.calibrate(get_format(name), mean_square, absmax)
  assert quantizer.scale.shape == (1, 4)
  for channel in range(4):
    alone = quantizers.calibrate(
      get_format(name), mean_square[0, channel], absmax[0, channel]
    )
    _assert_same_bits(quantizer.codes(x)[:, channel], alone.codes(x[:, channel]))
