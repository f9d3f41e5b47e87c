"""Thresholds and scales, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
from references import assert_same_bits, critical_values, random_values

from fliqs_jax.numerics import formats
from fliqs_jax.numerics.calibration import (
  CALIBRATIONS,
  calibrate,
  clipping_threshold,
  tensor_statistics,
)
from fliqs_jax.numerics.formats import get_format


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
    quantizer = calibrate(f, 1.0, np.float32(threshold), 'absmax')
    difference = np.asarray(_dequantize(quantizer, normal_sample)) - normal_sample
    return np.mean(np.square(difference, dtype=np.float64))

  # The distribution's own statistics, whose largest value is infinite.
  threshold = clipping_threshold(f, np.float32(1), np.float32(np.inf))
  best = error(threshold)
  # Octaves of a wide float agree to 1e-4 (clipping_thresholds.optimal_threshold).
  for factor in (0.8, 1.2):
    assert best <= error(factor * threshold) * (1 + 1e-4)


@pytest.mark.parametrize('name', references.LOW_PRECISION)
@pytest.mark.parametrize('calibration', CALIBRATIONS)
def test_scale_maps_the_threshold_to_the_largest_code(name, calibration):
  f = get_format(name)
  for seed in range(20):
    rng = np.random.default_rng(seed)
    x = rng.normal(0, np.exp(rng.uniform(-9, 9)), 500)
    mean_square, absmax = _statistics(x)
    limit = references.threshold(name, mean_square, absmax, calibration)
    quantizer = calibrate(f, mean_square, absmax, calibration)
    np.testing.assert_allclose(
      clipping_threshold(f, mean_square, absmax, calibration), limit, 1e-6
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
    quantizer = calibrate(get_format(name), mean_square, absmax)
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
  x = critical_values(name)
  x = x[np.isfinite(x) & (np.abs(x) < 2.0**60)]
  largest = references.largest(name)
  quantizer = calibrate(f, 1.0, np.float32(largest), 'absmax')
  shift = quantizer.scale
  assert np.log2(shift) == np.round(np.log2(shift))
  # Values that fall below float32's normals in units of codes are flushed.
  x = x[(np.abs(x) / shift >= np.finfo(np.float32).tiny) | (x == 0)]
  np.testing.assert_array_equal(
    np.asarray(quantizer.codes(x)) * shift, references.cast(x, name)
  )


@pytest.mark.parametrize('name', references.LOW_PRECISION)
def test_codes_and_their_products_fit_the_matrix_unit(name):
  quantizer = calibrate(get_format(name), 1.0, np.float32(3.0), 'absmax')
  codes = np.asarray(quantizer.codes(random_values(name, 2000)[2000:]))
  np.testing.assert_array_equal(codes, codes.astype(jnp.bfloat16).astype(np.float32))
  products = np.outer(codes[:500], codes[:500]).astype(np.float64)
  exact = np.outer(codes[:500].astype(np.float64), codes[:500].astype(np.float64))
  np.testing.assert_array_equal(products, exact)


@pytest.mark.parametrize('name', ['bf16', 'float32'])
@pytest.mark.parametrize('calibration', CALIBRATIONS)
def test_wide_formats_are_not_scaled(name, calibration):
  x = np.random.default_rng(0).normal(0, 100, 1000).astype(np.float32)
  quantizer = calibrate(get_format(name), *_statistics(x), calibration)
  assert quantizer.scale == 1
  assert_same_bits(quantizer.codes(x), references.cast(x, name))
  assert np.asarray(quantizer.inside(x)).all()


@pytest.mark.parametrize('name', formats.NAMES)
@pytest.mark.parametrize('calibration', CALIBRATIONS)
def test_a_tensor_of_zeros(name, calibration):
  zero = np.zeros((), np.float32)
  quantizer = calibrate(get_format(name), zero, zero, calibration)
  assert quantizer.scale == 1
  assert_same_bits(quantizer.codes(np.zeros(3, np.float32)), np.zeros(3))
  assert np.asarray(quantizer.inside(np.zeros(3, np.float32))).all()


@pytest.mark.parametrize('name', references.LOW_PRECISION)
@pytest.mark.parametrize('calibration', CALIBRATIONS)
@pytest.mark.parametrize('exponent', [-149, -140, -126, -110, -70, 60, 120])
def test_extreme_tensors_stay_finite_and_in_range(name, calibration, exponent):
  x = np.ldexp(np.float32([1, -0.7, 0.4]), exponent).astype(np.float32)
  with np.errstate(over='ignore'):
    mean_square = np.mean(np.square(x))  # in float32: it may overflow or underflow
  quantizer = calibrate(
    get_format(name), mean_square, np.abs(x).max(), calibration
  )
  values = np.asarray(_dequantize(quantizer, x))
  assert np.isfinite(values).all() and np.isfinite(quantizer.scale)
  assert quantizer.scale > 0
  if exponent > -120:  # else the scale is the smallest normal number
    assert (np.abs(values) <= np.abs(x).max() * (1 + 1e-6)).all()


@pytest.mark.parametrize('calibration', CALIBRATIONS)
@pytest.mark.parametrize('factor', [1e-25, 1e-19, 1e20, 1e37])
def test_tensors_whose_squares_float32_cannot_hold(factor, calibration):
  x = np.float32(factor) * np.random.default_rng(0).normal(size=256).astype(np.float32)
  largest = np.abs(x).max()

  @jax.jit
  def quantized(x):
    statistics = tensor_statistics(x)
    quantizer = calibrate(get_format('int8'), *statistics, calibration)
    return statistics, quantizer.codes(x) * quantizer.scale

  statistics, values = quantized(x)
  assert statistics.absmax == largest
  assert np.isfinite(statistics.mean_square)
  # Half of a step of 127, but for what `rms` clips of normal values.
  np.testing.assert_allclose(values, x, rtol=0, atol=largest * 0.51 / 127)


@pytest.mark.parametrize('name', references.LOW_PRECISION)
def test_absmax_calibration_passes_every_gradient(name):
  # "Nothing is clipped", the largest value itself least of all.
  x = np.random.default_rng(0).normal(size=(200, 9)).astype(np.float32)
  mean_square = np.mean(x**2, axis=1, keepdims=True)
  absmax = np.abs(x).max(axis=1, keepdims=True)
  quantizer = calibrate(get_format(name), mean_square, absmax, 'absmax')
  assert np.asarray(quantizer.inside(x)).all()


@pytest.mark.parametrize('name', references.LOW_PRECISION)
def test_scales_per_channel(name):
  x = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
  x *= np.float32([0.01, 1, 0, 300])
  mean_square = np.mean(x**2, axis=0, keepdims=True)
  absmax = np.abs(x).max(axis=0, keepdims=True)
  quantizer = calibrate(get_format(name), mean_square, absmax)
  assert quantizer.scale.shape == (1, 4)
  for channel in range(4):
    alone = calibrate(
      get_format(name), mean_square[0, channel], absmax[0, channel]
    )
    assert_same_bits(quantizer.codes(x)[:, channel], alone.codes(x[:, channel]))
