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
from fliqs_jax.numerics.units import UnitLayout, absmax_of_blocks, map_units

_SIGN_AND_EXPONENT = -(1 << 23)  # a float32 without its mantissa


class Contraction(NamedTuple):
  """The axes of a product's operands along which blocks lie, equally long in both."""

  x_axis: int
  w_axis: int
  groups: int = 1  # of a grouped convolution: parts of the axis of `x`, each as long


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=['of_units'],
  meta_fields=['layout'],
)
@dataclasses.dataclass(frozen=True)
class BlockScales:
  """The scales of the blocks of one tensor.

  Attributes:
    of_units: float32, of the tensor's shape but for the blocked axis, which is split
      into [groups, units]: the scale of the block that a unit is in.
    layout: of the tensor's units.
  """

  of_units: jax.Array
  layout: UnitLayout

  def map(
    self, function: Callable[..., jax.Array], x: jax.Array, scale: jax.Array
  ) -> jax.Array:
    """Returns `function(x, scale, block_scale)`, elementwise, in the shape of `x`.

    Args:
      function: of a tensor and of scales that are broadcastable to it.
      x: the tensor.
      scale: broadcastable to `x`, of length 1 along the blocked axis.
    """
    return map_units(function, x, scale, self.of_units, self.layout)


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
  layout = UnitLayout(axis, groups, math.gcd(*scaling.sizes))
  absmax = absmax_of_blocks(lax.stop_gradient(x), scaling, layout)
  inverse = 1.0 / tensor_scale
  if inverse.ndim:
    inverse = jnp.expand_dims(inverse, axis)
  scales = _rounded_scales(absmax * inverse, format.max, scaling)
  scales = jnp.where(has_blocks(scaling), scales, 1.0)
  return BlockScales(scales, layout)


def has_blocks(scaling: BlockScaling) -> jax.Array:
  """Returns whether the format has blocks, bool."""
  return functools.reduce(jnp.logical_or, scaling.has_size)


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
