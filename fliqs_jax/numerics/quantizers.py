"""Rounding to numeric formats, clipping thresholds and scales. All pure.

Notation: a tensor `x` is clipped at a threshold `t`, divided by the scale
`s = t / format.max`, and rounded to codes `q`, values of the format; `q · s ≈ x`.
"""

from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from fliqs_jax.numerics.formats import FLOAT32_MIN_EXPONENT, NumericFormat

CALIBRATIONS = ('rms', 'absmax')

_MANTISSA_BITS, _BIAS = 23, 127  # of float32
_MAGNITUDE = 0x7FFFFFFF  # all bits but the sign


def round_to_format(x: jax.Array, format: NumericFormat) -> jax.Array:
  """Rounds to the nearest value of a format, ties to even, saturating.

      e    = clip(floor(log2|x|), e_min, e_max)
      step = 2^(e − m)
      q    = clip(round_half_even(x / step) · step, −max, max)

  The same operations serve every format, so `format` can be traced: a compiled
  function works for all of them. Equal to the saturating cast of `ml_dtypes` bit by
  bit, for subnormals (also where the device flushes them), infinities and zeros too;
  NaN stays NaN. Without mantissa bits a tie goes up, as IEEE 754 has it.

  Args:
    x: any shape, a floating dtype; computed in float32.
    format: fields broadcast against `x`; a scalar format in the usual case.

  Returns:
    The rounded values, in the shape and dtype of `x`.
  """
  x = jnp.asarray(x)
  value = x.astype(jnp.float32)
  bits = lax.bitcast_convert_type(value, jnp.int32)
  magnitude = bits & _MAGNITUDE
  rounded = jnp.where(
    is_scaled(format),
    _round_to_steps(value, magnitude, format),
    _round_mantissa(bits, magnitude, format),
  )
  return jnp.where(jnp.isnan(value), value, rounded).astype(x.dtype)


def _round_to_steps(value, magnitude, format):
  """The formula above, for formats whose steps are normal float32 numbers."""
  exponent = jnp.clip(
    (magnitude >> _MANTISSA_BITS) - _BIAS, format.exponent_min, format.exponent_max
  )
  step_exponent = exponent - format.mantissa_bits
  steps = jnp.round(value * _power_of_two(-step_exponent))
  return jnp.clip(steps * _power_of_two(step_exponent), -format.max, format.max)


def _round_mantissa(bits, magnitude, format):
  """The same for formats with float32's own exponents: drops low mantissa bits.

  On the bits and not the values, because float32 subnormals, which such formats
  represent, are flushed to zero by the arithmetic of CPUs and TPUs.
  """
  dropped = _MANTISSA_BITS - format.mantissa_bits
  unit = jnp.left_shift(1, dropped)
  tie_to_even = (magnitude >> dropped) & jnp.minimum(dropped, 1)
  rounded = (magnitude + ((unit - 1) >> 1) + tie_to_even) & -unit
  largest = lax.bitcast_convert_type(jnp.float32(format.max), jnp.int32)
  saturated = jnp.minimum(rounded, largest)
  return lax.bitcast_convert_type(saturated | (bits & ~_MAGNITUDE), jnp.float32)


def _power_of_two(exponent):
  """2^exponent as float32, exactly, for exponents of normal numbers."""
  return lax.bitcast_convert_type((exponent + _BIAS) << _MANTISSA_BITS, jnp.float32)


def is_scaled(format: NumericFormat) -> jax.Array:
  """Whether codes of the format are scaled; bf16 and float32 are not. bool."""
  return jnp.asarray(format.exponent_min) > FLOAT32_MIN_EXPONENT


def clipping_threshold(
  format: NumericFormat,
  mean_square: jax.Array,
  absmax: jax.Array,
  calibration: str = 'rms',
) -> jax.Array:
  """Returns the clipping threshold of a tensor in a format.

  `rms`: `min(format.clip · sqrt(mean_square), absmax)`, the MSE-optimal threshold for
  normal data (FLIQS, Section 3.4 and Figure 4a). `absmax`: nothing is clipped.

  Args:
    format: a scalar format.
    mean_square: the mean of the tensor's squares, any shape (per tensor or channel).
    absmax: the largest magnitude, the same shape.
    calibration: one of `CALIBRATIONS`.

  Returns:
    float32 thresholds, in the shape of the statistics. Meaningless, but finite, for
    the formats that are not scaled.
  """
  if calibration == 'absmax':
    return absmax
  return jnp.minimum(format.clip * jnp.sqrt(mean_square), absmax)


class Quantizer(NamedTuple):
  """The scale and the format of one tensor."""

  scale: jax.Array  # float32, broadcastable to the tensor
  format: NumericFormat  # scalar fields, exponents in code range

  def codes(self, x: jax.Array) -> jax.Array:
    """Returns `round_to_format(x / scale, format)` in float32."""
    return round_to_format(self._in_code_units(x), self.format)

  def inside(self, x: jax.Array) -> jax.Array:
    """Where the clipped straight-through estimator passes the gradient. bool."""
    # Three roundings stand between a threshold and the largest code; what lies at the
    # threshold, as the largest value of a tensor often does, is inside.
    largest = self.format.max * (1 + 2.0**-22)
    return jnp.abs(self._in_code_units(x)) <= largest

  def _in_code_units(self, x):
    return x.astype(jnp.float32) * (1.0 / self.scale)


def calibrate(
  format: NumericFormat,
  mean_square: jax.Array,
  absmax: jax.Array,
  calibration: str = 'rms',
) -> Quantizer:
  """Returns the quantizer of a tensor whose statistics are given.

  The scale maps the clipping threshold to the largest code. It is 1 for a format that
  is not scaled and for a tensor of zeros. The arguments are `clipping_threshold`'s.
  """
  threshold = clipping_threshold(format, mean_square, absmax, calibration)
  format = _to_code_range(format)
  # A scale below float32's normal range would be flushed to zero.
  scale = jnp.maximum(threshold / format.max, jnp.finfo(jnp.float32).tiny)
  return Quantizer(jnp.where(is_scaled(format) & (threshold > 0), scale, 1.0), format)


def _to_code_range(format):
  """Shifts a format's exponents so that the largest is 1; integers stay as they are.

  Codes are scaled anyway, so the exponent bias is free, and products of two codes
  must stay in float32's range, which those of e7m0 as it is would leave.
  """
  is_float = is_scaled(format) & (jnp.asarray(format.exponent_max) > 0)
  shift = jnp.where(is_float, format.exponent_max - 1, 0)
  return format._replace(
    exponent_min=format.exponent_min - shift,
    exponent_max=format.exponent_max - shift,
    max=format.max * _power_of_two(-shift),
  )
