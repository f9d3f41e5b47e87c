"""Blocks: consecutive values along the contraction of a layer that share one scale.

Every size of block that a table of formats has is a multiple of a *unit*, their
greatest common divisor. Largest magnitudes are taken of units, and those of blocks from
them, so that a tensor is read once however many sizes there are, and which of them a
format has is data. A last block may be shorter.
"""

from collections.abc import Callable
import dataclasses
import functools
import math
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from fliqs_jax.numerics.formats import BlockScaling, NumericFormat
from fliqs_jax.numerics.rounding import round_to_format

_SIGN_AND_EXPONENT = -(1 << 23)  # a float32 without its mantissa


class Contraction(NamedTuple):
  """The axes of a product's operands along which blocks lie, equally long in both."""

  x_axis: int
  w_axis: int
  groups: int = 1  # of a grouped convolution: parts of the axis of `x`, each as long


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=['of_units'],
  meta_fields=['axis', 'groups', 'unit'],
)
@dataclasses.dataclass(frozen=True)
class BlockScales:
  """The scales of the blocks of one tensor.

  Attributes:
    of_units: float32, of the tensor's shape but for the blocked axis, which is split
      into [groups, units]: the scale of the block that a unit is in.
    axis: of the tensor, along which the blocks lie.
    groups: parts of that axis, each with blocks of its own.
    unit: values in a unit.
  """

  of_units: jax.Array
  axis: int
  groups: int
  unit: int

  def map(
    self, function: Callable[..., jax.Array], x: jax.Array, scale: jax.Array
  ) -> jax.Array:
    """Returns `function(x, scale, block_scale)`, elementwise, in the shape of `x`.

    It is called on values whose blocked axis is split into [groups, units, unit], so
    that scales are broadcast within it: spread over the tensor, as long as it, they
    would be written to memory and read again.

    Args:
      function: of a tensor and of scales that are broadcastable to it.
      x: the tensor.
      scale: broadcastable to `x`, of length 1 along the blocked axis.
    """
    axis = self.axis
    values = _split_units(x, axis, self.groups, self.unit)
    if scale.ndim:
      scale = jnp.expand_dims(scale, (axis + 1, axis + 2))
    y = function(values, scale, jnp.expand_dims(self.of_units, axis + 2))
    y = _merge(y, axis + 1)
    y = lax.slice_in_dim(y, 0, x.shape[axis] // self.groups, axis=axis + 1)
    return _merge(y, axis)


def block_scales(
  x: jax.Array,
  tensor_scale: jax.Array,
  format: NumericFormat,
  axis: int,
  groups: int = 1,
) -> BlockScales:
  """Returns the scales of the blocks of a tensor; 1 where the format has no blocks.

  A scale is `absmax / format.max`, rounded to the format of scales. In E8M0, which has
  no mantissa bits, it is `2^(floor(log2(absmax)) − floor(log2(format.max)))`, as OCP
  Microscaling Formats 1.0 (2023), Section 6.3, has it, so that the largest values of a
  block may saturate.

  Args:
    x: the tensor.
    tensor_scale: float32, broadcastable to `x`, of length 1 along the blocked axis; the
      blocks are those of `x / tensor_scale`.
    format: a scalar format of a table that has blocks.
    axis: of `x`, along which the blocks lie.
    groups: parts of that axis, each with blocks of its own.
  """
  scaling = format.blocks
  unit = math.gcd(*scaling.sizes)
  absmax = _absmax_of_units(lax.stop_gradient(x), axis, groups, unit)
  absmax = sum(
    jnp.where(has_size, _absmax_of_blocks(absmax, axis + 1, size // unit), 0.0)
    for size, has_size in zip(scaling.sizes, scaling.has_size)
  )
  inverse = 1.0 / tensor_scale
  if inverse.ndim:
    inverse = jnp.expand_dims(inverse, axis)
  scales = _rounded_scales(absmax * inverse, format.max, scaling)
  scales = jnp.where(has_blocks(scaling), scales, 1.0)
  return BlockScales(scales, axis, groups, unit)


def has_blocks(scaling: BlockScaling) -> jax.Array:
  """Returns whether the format has blocks, bool."""
  return functools.reduce(jnp.logical_or, scaling.has_size)


def _absmax_of_units(x, axis, groups, unit):
  """float32, the axis of `x` split into [groups, units]."""
  values = _split_units(x, axis, groups, unit)
  return jnp.max(jnp.abs(values.astype(jnp.float32)), axis=axis + 2)


def _split_units(x, axis, groups, unit):
  """Splits an axis into [groups, units, unit], last units filled with zeros."""
  shape = (*x.shape[:axis], groups, x.shape[axis] // groups, *x.shape[axis + 1 :])
  # XLA would move the reshape behind what is computed of its result, and then write
  # magnitudes and scales to memory, as long as the tensor and in float32, and read
  # them again. As it stands no byte moves for it.
  return lax.optimization_barrier(_split(x.reshape(shape), axis + 1, unit))


def _absmax_of_blocks(absmax, axis, units):
  """The largest of every `units` along an axis, each as often as there are units."""
  if units == 1:
    return absmax
  largest = jnp.max(_split(absmax, axis, units), axis=axis + 1, keepdims=True)
  spread = (*largest.shape[: axis + 1], units, *largest.shape[axis + 2 :])
  largest = _merge(jnp.broadcast_to(largest, spread), axis)
  return lax.slice_in_dim(largest, 0, absmax.shape[axis], axis=axis)


def _rounded_scales(absmax, largest, scaling):
  """Returns the scales of blocks, 0 where one is too small for the format of scales."""
  powers_of_two = scaling.scale.mantissa_bits == 0
  mask = jnp.where(powers_of_two, _SIGN_AND_EXPONENT, -1)

  def floor(x):
    bits = lax.bitcast_convert_type(jnp.float32(x), jnp.int32)
    return lax.bitcast_convert_type(bits & mask, jnp.float32)

  scales = round_to_format(floor(absmax) / floor(largest), scaling.scale)
  lowest = jnp.where(powers_of_two, jnp.finfo(jnp.float32).tiny, 0.0)
  return jnp.maximum(scales, lowest)


def _split(x, axis, size):
  """Splits an axis into [parts, size], the last part filled with zeros."""
  length = x.shape[axis]
  missing = -length % size
  if missing:
    x = jnp.pad(x, [(0, missing if a == axis else 0) for a in range(x.ndim)])
  shape = (*x.shape[:axis], (length + missing) // size, size, *x.shape[axis + 1 :])
  return x.reshape(shape)


def _merge(x, axis):
  """The inverse: makes one axis of this and the next."""
  shape = (*x.shape[:axis], x.shape[axis] * x.shape[axis + 1], *x.shape[axis + 2 :])
  return x.reshape(shape)
