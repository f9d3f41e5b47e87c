"""By other means than the package's: rounding, by ml_dtypes or enumerated; resizing."""

import re

import ml_dtypes
import numpy as np

from fliqs_jax.numerics import formats

ML_DTYPES = {
  'e4m3': ml_dtypes.float8_e4m3fn,
  'e5m2': ml_dtypes.float8_e5m2,
  'e3m4': ml_dtypes.float8_e3m4,
  'e2m3': ml_dtypes.float6_e2m3fn,
  'e3m2': ml_dtypes.float6_e3m2fn,
  'e2m1': ml_dtypes.float4_e2m1fn,
  'bf16': ml_dtypes.bfloat16,
}
LOW_PRECISION = formats.INTEGER_NAMES + formats.FLOAT_NAMES  # all that are scaled


def positive_codes(name: str) -> np.ndarray:
  """Returns the non-negative finite values in the order of their codes, float64."""
  if name in formats.INTEGER_NAMES:
    return np.arange(2.0 ** (int(name[3:]) - 1))
  if name in ML_DTYPES:
    dtype = ML_DTYPES[name]
    bits = ml_dtypes.finfo(dtype).bits
    codes = np.arange(2 ** (bits - 1), dtype=np.uint16 if bits == 16 else np.uint8)
    with np.errstate(invalid='ignore'):  # signalling NaNs
      values = codes.view(dtype).astype(np.float64)
    return values[np.isfinite(values)]
  # No type of that name: all codes are finite, as in the OCP Microscaling formats.
  exponent_bits, mantissa_bits = map(int, re.fullmatch(r'e(\d)m(\d)', name).groups())
  bias = 2 ** (exponent_bits - 1) - 1
  exponent, mantissa = np.divmod(
    np.arange(2 ** (exponent_bits + mantissa_bits)), 2**mantissa_bits
  )
  fraction = mantissa / 2.0**mantissa_bits
  return np.where(
    exponent == 0,
    fraction * 2.0 ** (1 - bias),
    (1 + fraction) * 2.0 ** (exponent - bias),
  )


def nearest_code(x: np.ndarray, name: str) -> np.ndarray:
  """Rounds to the nearest of all codes, compared one by one, in float64.

  A tie goes to the even code. Formats without a mantissa have no even significand to
  choose; there IEEE 754-2019 (4.3.1) takes the larger magnitude, but zero is even.
  """
  codes = positive_codes(name)
  with np.errstate(invalid='ignore'):
    x = np.asarray(x, np.float64)
  magnitude = np.minimum(np.abs(x), codes[-1])
  above = np.clip(np.searchsorted(codes, magnitude), 1, len(codes) - 1)
  below = above - 1
  to_above, to_below = codes[above] - magnitude, magnitude - codes[below]
  even = np.where(above % 2 == 0, above, below)
  if name.endswith('m0'):
    even = np.where(below == 0, below, above)
  index = np.where(
    to_above < to_below, above, np.where(to_above > to_below, below, even)
  )
  return np.where(np.isnan(x), np.nan, np.copysign(codes[index], x))


def cast(x: np.ndarray, name: str) -> np.ndarray:
  """Rounds float32 to a format: the saturating cast, float32."""
  x = np.asarray(x, np.float32)
  if name == 'float32':
    return x
  if name in formats.INTEGER_NAMES:
    largest = 2.0 ** (int(name[3:]) - 1) - 1
    with np.errstate(invalid='ignore'):
      return np.clip(np.rint(x), -largest, largest)
  if name not in ML_DTYPES:
    return nearest_code(x, name).astype(np.float32)
  largest = np.float32(ml_dtypes.finfo(ML_DTYPES[name]).max)
  # Some types have no NaN to cast to.
  finite = np.clip(np.where(np.isnan(x), 0, x), -largest, largest)
  rounded = finite.astype(ML_DTYPES[name]).astype(np.float32)
  return np.where(np.isnan(x), np.float32(np.nan), rounded)


def largest(name: str) -> float:
  """Returns the largest finite value of a format that is scaled."""
  return float(positive_codes(name)[-1])


def threshold(name, mean_square, absmax, calibration='rms'):
  """Returns the clipping threshold in float64, of any shape."""
  if calibration == 'absmax':
    return np.float64(absmax)
  clip = np.float64(formats.get_format(name).clip)
  return np.minimum(clip * np.sqrt(np.float64(mean_square)), absmax)


def fake_quantize(x, name, mean_square, absmax, calibration='rms'):
  """Returns `s · round(x / s)` in float64 and where `|x|` is within the threshold."""
  x = np.asarray(x, np.float64)
  if name in ('bf16', 'float32'):
    return cast(x, name).astype(np.float64), np.ones(x.shape, bool)
  limit = threshold(name, mean_square, absmax, calibration)
  scale = limit / largest(name)
  return scale * nearest_code(x / scale, name), np.abs(x) <= limit


def assert_same_bits(actual, expected):
  """Asserts equality: NaNs may differ in their payload, zeros not in their sign."""
  actual, expected = np.asarray(actual), np.asarray(expected, np.float32)
  assert actual.dtype == np.float32
  np.testing.assert_array_equal(np.isnan(actual), np.isnan(expected))
  number = ~np.isnan(expected)
  np.testing.assert_array_equal(
    actual[number].view(np.uint32), expected[number].view(np.uint32)
  )


def critical_values(name: str) -> np.ndarray:
  """Returns codes, midpoints, their neighbours in float32, and special values."""
  codes = positive_codes(name)
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


def random_values(name: str, size: int = 500_000) -> np.ndarray:
  """Returns any bit pattern, and magnitudes about the format's own."""
  rng = np.random.default_rng(formats.NAMES.index(name))
  patterns = rng.integers(0, 2**32, size, np.uint32).view(np.float32)
  codes = positive_codes(name)
  low, high = np.log2(codes[1]) - 2, np.log2(codes[-1]) + 1
  exponents = rng.uniform(low, min(high, 127.9), size)
  magnitudes = np.exp2(exponents) * rng.choice([-1, 1], size)
  return np.concatenate([patterns, magnitudes.astype(np.float32)])


def area_means(image, size):
  """Resizes `[H, W, C]` to `(width, height)`, each pixel the mean of what it covers."""

  def weights(old, new):
    edges = np.arange(new + 1)[:, None] * old / new
    below = np.clip(edges - np.arange(old), 0, 1)  # of each old pixel, below an edge
    return np.diff(below, axis=0) * new / old

  rows, columns = weights(image.shape[0], size[1]), weights(image.shape[1], size[0])
  return np.einsum('yh,xw,hwc->yxc', rows, columns, image.astype(float), optimize=True)
