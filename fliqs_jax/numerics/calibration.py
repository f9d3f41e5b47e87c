"""Calibration: statistics of a tensor, its clipping threshold, and its scale.

Notation: a tensor `x` is clipped at a threshold `t`, divided by the scale
`s = t / format.max`, and rounded to codes `q`, values of the format; `q · s ≈ x`.

In a block format each block has a scale `s_b` more, that of its largest magnitude, so
that `q · s_b · s ≈ x` and nothing is clipped at a threshold. There `s` is 1, or, where
scales of blocks are E4M3, it maps the largest of these to 448.
"""

from collections.abc import Sequence
import functools
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from fliqs_jax.numerics.blocks import BlockScales, block_scales, has_blocks
from fliqs_jax.numerics.formats import NumericFormat
from fliqs_jax.numerics.masking import ActiveAxis
from fliqs_jax.numerics.rounding import is_scaled, power_of_two, round_to_format

CALIBRATIONS = ('rms', 'absmax')
"""Ways to set a clipping threshold: see `clipping_threshold`."""

LAYER_CALIBRATIONS = (*CALIBRATIONS, 'rms_absmax')
"""The same for the two operands of a layer; the last is `rms` for activations and
`absmax` for weights."""

ACTIVATION_SCALES = ('tensor', 'token')
"""What shares a scale of activations: see `products.quantized_layer`."""

# Of means of squares: beyond these, squares may be missing that are no float32.
_SMALLEST, _LARGEST = 2.0**-100, 2.0**126


class Statistics(NamedTuple):
  """Statistics of a tensor, or of each of its channels, that set thresholds."""

  # float32[...], the mean of the squares; the largest number where it is beyond that
  mean_square: jax.Array
  absmax: jax.Array  # float32[...], the largest magnitude


def tensor_statistics(
  x: jax.Array,
  axes: Sequence[int] | None = None,
  active: Sequence[ActiveAxis] = (),
) -> Statistics:
  """Returns the statistics of a tensor.

  Args:
    x: any shape, with zeros outside of its active parts.
    axes: the axes that one statistic spans, kept with length 1; None for one statistic
      of the whole tensor, of shape `()`.
    active: the parts of the axes of `x` that count.
  """
  spanned = lambda axis: axes is None or axis in axes
  shares = [share for axis, _, share in active if spanned(axis)]
  return _statistics(x, None if axes is None else tuple(axes), shares)


@functools.partial(jax.jit, static_argnames='axes')
def _statistics(x, axes, shares):
  x = lax.stop_gradient(x).astype(jnp.float32)
  keepdims = axes is not None
  mean = jnp.mean(jnp.square(x), axes, keepdims=keepdims)
  # Not the root of the largest square, which leaves float32's range long before `x`.
  absmax = jnp.max(jnp.abs(x), axes, keepdims=keepdims)
  for share in shares:
    mean = mean / share
  # An infinite mean would stay in a moving average for good.
  mean = jnp.where(jnp.isposinf(mean), jnp.finfo(jnp.float32).max, mean)
  return Statistics(mean, absmax)


def moving_average(
  old: Statistics,
  new: Statistics,
  momentum: float,
  present: jax.Array | None = None,
) -> Statistics:
  """Returns `momentum · old + (1 − momentum) · new`, or `new` where `old` is zero.

  Args:
    old: zeros before the first update.
    new: of the tensor at hand.
    momentum: of the average.
    present: int32[], 0 where a layer is skipped, which keeps `old`; None for a layer
      that is always there.
  """

  def average(old, new):
    kept = jnp.where(old > 0, momentum, 0.0)
    mean = kept * old + (1 - kept) * new
    return mean if present is None else jnp.where(present > 0, mean, old)

  return Statistics(*map(average, old, new))


def clipping_threshold(
  format: NumericFormat,
  mean_square: jax.Array,
  absmax: jax.Array,
  calibration: str = 'rms',
) -> jax.Array:
  """Returns the clipping threshold of a tensor in a format.

  `rms`: `min(format.clip · sqrt(mean_square), absmax)`, the MSE-optimal threshold for
  normal data (FLIQS, Section 3.4 and Figure 4a). `absmax`: nothing is clipped, as in
  tensors whose squares float32 cannot hold: rms below 1e-15 or above 1e19.

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
  clipped = jnp.minimum(format.clip * jnp.sqrt(mean_square), absmax)
  known = (mean_square >= _SMALLEST) & (mean_square <= _LARGEST)
  return jnp.where(known, clipped, absmax)


class Quantizer(NamedTuple):
  """The scales and the format of one tensor."""

  scale: jax.Array  # float32, broadcastable to the tensor
  format: NumericFormat  # scalar fields, exponents in code range
  blocks: BlockScales | None = None  # None where no format of its table has blocks

  def codes(self, x: jax.Array) -> jax.Array:
    """Returns `round_to_format(x / scale, format)` in float32."""
    if self.blocks is None:
      return round_to_format(_divided(x, self.scale), self.format)
    return self.blocks.map(self._codes_in_blocks, x, self.scale)

  def multiplicands(self, x: jax.Array) -> jax.Array:
    """Returns `values(x) / scale`: what is multiplied before that scale is applied."""
    if self.blocks is None:
      return self.codes(x)
    # An empty block's scale may be 0, as are its codes.
    return self.blocks.map(
      lambda *scaled: self._codes_in_blocks(*scaled) * scaled[-1], x, self.scale
    )

  def values(self, x: jax.Array) -> jax.Array:
    """Returns the values of the format that stand for `x`, in float32."""
    return self.multiplicands(x) * self.scale

  def inside(self, x: jax.Array) -> jax.Array:
    """Returns, as bools, where the clipped straight-through gradient passes."""
    if self.blocks is None:
      return self._inside_threshold(x)
    return self._inside_threshold(x) | has_blocks(self.format.blocks)

  def _inside_threshold(self, x):
    # Three roundings stand between a threshold and the largest code; what lies at the
    # threshold, as the largest value of a tensor often does, is inside.
    largest = self.format.max * (1 + 2.0**-22)
    return jnp.abs(_divided(x, self.scale)) <= largest

  def _codes_in_blocks(self, x, scale, block_scale):
    x = _divided(x, scale)
    divisor = jnp.where(block_scale > 0, block_scale, 1.0)
    # Divided, since the inverse of a scale with a mantissa is rounded, and by what is
    # no plain broadcast, which XLA would invert once for all values of a block.
    return round_to_format(x / jnp.where(jnp.isnan(x), x, divisor), self.format)


def _divided(x, scale):
  return x.astype(jnp.float32) * (1.0 / scale)


def of_weights(calibration: str) -> str:
  """Returns the calibration of weights, of one of `LAYER_CALIBRATIONS`."""
  return 'absmax' if calibration == 'rms_absmax' else calibration


def of_activations(calibration: str) -> str:
  """Returns the calibration of activations, of one of `LAYER_CALIBRATIONS`."""
  return 'rms' if calibration == 'rms_absmax' else calibration


@functools.partial(jax.jit, static_argnames='calibration')
def calibrate(
  format: NumericFormat,
  mean_square: jax.Array,
  absmax: jax.Array,
  calibration: str = 'rms',
) -> Quantizer:
  """Returns the quantizer of a tensor whose statistics are given.

  The scale maps the clipping threshold to the largest code. It is 1 for a format that
  is not scaled and for a tensor of zeros. The arguments are `clipping_threshold`'s.

  Raises:
    ValueError: for a format of a table with blocks, which `calibrate_blocks` is for.

  Examples:
    >>> import jax.numpy as jnp
    >>> from fliqs_jax.numerics import calibrate, get_format
    >>> x = jnp.array([0.5, -1.0, 0.25, 4.0])
    >>> absmax = jnp.max(jnp.abs(x))
    >>> quantizer = calibrate(get_format('int4'), jnp.mean(x**2), absmax, 'absmax')
    >>> quantizer.codes(x)
    Array([ 1., -2.,  0.,  7.], dtype=float32)
  """
  if format.blocks is not None:
    raise ValueError('a format with blocks: expected calibrate_blocks, and the tensor')
  threshold = clipping_threshold(format, mean_square, absmax, calibration)
  format = _to_code_range(format)
  # A scale below float32's normal range would be flushed to zero.
  scale = jnp.maximum(threshold / format.max, jnp.finfo(jnp.float32).tiny)
  return Quantizer(jnp.where(is_scaled(format) & (threshold > 0), scale, 1.0), format)


def calibrate_blocks(
  x: jax.Array,
  format: NumericFormat,
  mean_square: jax.Array,
  absmax: jax.Array,
  calibration: str,
  axis: int,
  groups: int = 1,
) -> Quantizer:
  """Returns the quantizer of a tensor by a format of a table that has blocks.

  Args:
    x: the tensor.
    format: a scalar format, with blocks or without.
    mean_square: as for `calibrate`.
    absmax: as for `calibrate`.
    calibration: as for `calibrate`, of a format without blocks.
    axis: of `x`, along which the blocks lie.
    groups: parts of that axis, each with blocks of its own.
  """
  scaling, element = format.blocks, format._replace(blocks=None)
  quantizer = calibrate(element, mean_square, absmax, calibration)
  blocked = has_blocks(scaling)
  has_tensor_scale = scaling.tensor_largest > 0
  largest = element.max * jnp.where(has_tensor_scale, scaling.tensor_largest, 1.0)
  tensor_scale = jnp.max(absmax) / largest
  # As in `calibrate`, a scale below float32's normal range would be flushed to zero.
  has_tensor_scale &= tensor_scale >= jnp.finfo(jnp.float32).tiny
  tensor_scale = jnp.where(has_tensor_scale, tensor_scale, 1.0)
  scale, element = jax.tree.map(
    functools.partial(jnp.where, blocked),
    (tensor_scale, element),
    (quantizer.scale, quantizer.format),
  )
  return Quantizer(
    scale,
    element._replace(blocks=scaling),
    block_scales(x, scale, format, axis, groups),
  )


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
    max=format.max * power_of_two(-shift),
  )
