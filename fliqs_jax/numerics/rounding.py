"""Rounding to a numeric format, one branch-free function for all of them."""

import jax
from jax import lax
import jax.numpy as jnp

from fliqs_jax.numerics.formats import FLOAT32_MIN_EXPONENT, NumericFormat

_MANTISSA_BITS, _BIAS = 23, 127  # of float32
_MAGNITUDE = 0x7FFFFFFF  # all bits but the sign


# Traced and lowered once for each shape of a network, and one program where it is not
# within another.
@jax.jit
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

  Examples:
    >>> import jax.numpy as jnp
    >>> from fliqs_jax.numerics import get_format, round_to_format
    >>> round_to_format(jnp.array([0.2, 2.6, 9.0]), get_format('int4'))
    Array([0., 3., 7.], dtype=float32)
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
  steps = jnp.round(value * power_of_two(-step_exponent))
  return jnp.clip(steps * power_of_two(step_exponent), -format.max, format.max)


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


def power_of_two(exponent):
  """Returns 2^exponent as float32, exactly, for exponents of normal numbers."""
  return lax.bitcast_convert_type((exponent + _BIAS) << _MANTISSA_BITS, jnp.float32)


def is_scaled(format: NumericFormat) -> jax.Array:
  """Returns whether codes of a format are scaled, bool; bf16 and float32 are not."""
  return jnp.asarray(format.exponent_min) > FLOAT32_MIN_EXPONENT
