"""Codes of numeric formats as bits, several of them packed into bytes.

A code of a float is its sign, exponent and mantissa, that of an integer its two's
complement, each in as many bits as the format has. For the types of `ml_dtypes` these
are the bits that the type itself has.
"""

import functools
import math

import ml_dtypes
import numpy as np

from fliqs_jax.numerics.formats import Format, find_format

# From the narrowest on: integers hold those of fewer bits, floats are tried in turn.
_INTEGERS = ((2, ml_dtypes.int2), (4, ml_dtypes.int4), (8, np.int8))
_FLOATS = (
  ml_dtypes.float4_e2m1fn,
  ml_dtypes.float6_e2m3fn,
  ml_dtypes.float6_e3m2fn,
  ml_dtypes.float8_e4m3fn,
  ml_dtypes.float8_e5m2,
  ml_dtypes.float8_e3m4,
  ml_dtypes.bfloat16,
)
_UNSCALED = {'bf16': ml_dtypes.bfloat16, 'float32': np.float32}
# Of scales of blocks; numpy has the last itself.
_SCALES = {
  'e8m0': ml_dtypes.float8_e8m0fnu,
  'e4m3': ml_dtypes.float8_e4m3fn,
  'bf16': ml_dtypes.bfloat16,
  'float16': np.float16,
}
_BYTE = 8


def dtype_of(name: str) -> np.dtype:
  """Returns the narrowest type that holds every value of a format.

  That is the format's own type where `ml_dtypes` has one.
  """
  format = find_format(name)
  if format.family == 'unscaled':
    return np.dtype(_UNSCALED[name])
  if format.family == 'int':
    return np.dtype(next(dtype for bits, dtype in _INTEGERS if bits >= format.bits))
  values = values_of(name)
  finite = values[np.isfinite(values)]
  return np.dtype(next(dtype for dtype in _FLOATS if _holds(dtype, finite)))


def scale_dtype(name: str) -> np.dtype:
  """Returns the type of the scales of blocks, one of `formats.SCALES`."""
  return np.dtype(_SCALES[name])


def _holds(dtype, values):
  with np.errstate(over='ignore'):
    cast = values.astype(dtype).astype(np.float32)
  return np.array_equal(cast, values)


@functools.cache
def values_of(name: str) -> np.ndarray:
  """Returns the value of every code of a format of at most 8 bits, float32[2^bits].

  A code that stands for no number of the format is NaN.
  """
  format = find_format(name)
  codes = np.arange(2**format.bits)
  if format.family == 'int':
    half = 2 ** (format.bits - 1)
    values = np.where(codes < half, codes, codes - 2 * half).astype(np.float64)
  else:
    values = _float_values(format, codes)
  values[np.abs(values) > format.largest] = np.nan
  return values.astype(np.float32)


def _float_values(format: Format, codes):
  half = 2 ** (format.bits - 1)
  exponent, mantissa = np.divmod(codes % half, 2**format.mantissa_bits)
  # Subnormals have the exponent of the smallest normal numbers.
  significand = mantissa * 2.0**-format.mantissa_bits + (exponent > 0)
  power = np.maximum(exponent, 1) - 1 + format.exponent_min
  return np.where(codes < half, 1, -1) * significand * 2.0**power


def to_bits(values: np.ndarray, name: str) -> np.ndarray:
  """Returns the codes of values of a format of at most 8 bits, uint8.

  Args:
    values: exactly representable.
    name: of the format.
  """
  table = values_of(name)
  half = len(table) // 2
  values = np.asarray(values, np.float32)
  if find_format(name).family == 'int':
    return (values.astype(np.int32) % len(table)).astype(np.uint8)
  positive = np.where(np.isnan(table[:half]), np.inf, table[:half])
  magnitude = np.searchsorted(positive, np.abs(values))
  return (magnitude + half * np.signbit(values)).astype(np.uint8)


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
  """Returns codes of a few bits one after the other, uint8[⌈size · bits / 8⌉].

  The first code is in the lowest bits of the first byte.

  Args:
    codes: uint8, in the order of the flattened array.
    bits: of each.
  """
  spread = np.unpackbits(codes.reshape(-1, 1), axis=1, bitorder='little')[:, :bits]
  return np.packbits(spread.ravel(), bitorder='little')


def packed_size(count: int, bits: int) -> int:
  """Returns the bytes of packed codes."""
  return math.ceil(count * bits / _BYTE)
