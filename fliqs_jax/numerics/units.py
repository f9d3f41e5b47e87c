"""Units of blocks: runs of values along an axis, and numbers that each of them has.

There are two ways to compute with them. On CPUs and GPUs the axis is split into
[units, unit], and numbers are broadcast. XLA for TPUs cannot fuse a reshape that splits
an axis: what is computed before it is written to memory, and so is what follows. There
the last axis stays whole where its units are few: magnitudes of each are picked by a
mask, and numbers are spread by selects, both of which are fused with what is computed
before and after. Values are the same bit by bit.
"""

from collections.abc import Callable
import functools
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from fliqs_jax.numerics.formats import BlockScaling

# Of an axis that stays whole. Twice as many saved 1 % of a step's bytes in ResNet-18.
_MOST_UNITS = 16


class UnitLayout(NamedTuple):
  """Axis, groups and size of the units of a tensor.

  Attributes:
    axis: of the tensor, along which they lie.
    groups: parts of that axis, each with units of its own.
    size: values in a unit.
  """

  axis: int
  groups: int
  size: int


def absmax_of_blocks(
  x: jax.Array, scaling: BlockScaling, layout: UnitLayout
) -> jax.Array:
  """Returns the largest magnitude of the block that each unit is in; 0 without blocks.

  Args:
    x: the tensor.
    scaling: of a scalar format, which says the size of blocks.
    layout: of the units of `x`.

  Returns:
    float32, the axis of `x` split into [groups, units].
  """
  split = functools.partial(_absmax_split, layout=layout)
  if not _can_stay_whole(x, layout):
    return split(x, scaling)
  whole = functools.partial(_absmax_whole, unit=layout.size)
  return lax.platform_dependent(x, scaling, tpu=whole, default=split)


def map_units(
  function: Callable[..., jax.Array],
  x: jax.Array,
  scale: jax.Array,
  of_units: jax.Array,
  layout: UnitLayout,
) -> jax.Array:
  """Returns `function(x, scale, number of the unit)`, elementwise, in the shape of `x`.

  Args:
    function: of a tensor and of numbers that are broadcastable to it. It may see the
      tensor in another shape.
    x: the tensor.
    scale: broadcastable to `x`, of length 1 along the axis.
    of_units: float32, not negative, in the shape of `absmax_of_blocks`.
    layout: of the units of `x`.
  """
  axis, groups, size = layout

  def split(x, scale, of_units):
    values = _split_units(x, layout)
    if scale.ndim:
      scale = jnp.expand_dims(scale, (axis + 1, axis + 2))
    y = function(values, scale, jnp.expand_dims(of_units, axis + 2))
    y = _merge(y, axis + 1)
    y = lax.slice_in_dim(y, 0, x.shape[axis] // groups, axis=axis + 1)
    return _merge(y, axis)

  def whole(x, scale, of_units):
    spread = _spread(jnp.squeeze(of_units, axis), x.shape[axis], size)
    return function(x, scale, spread)

  if not _can_stay_whole(x, layout):
    return split(x, scale, of_units)
  return lax.platform_dependent(x, scale, of_units, tpu=whole, default=split)


def _can_stay_whole(x, layout):
  axis, groups, size = layout
  return axis == x.ndim - 1 and groups == 1 and x.shape[axis] <= _MOST_UNITS * size


def _absmax_whole(x, scaling, unit):
  unit_of_value = jnp.arange(x.shape[-1]) // unit
  units = jnp.arange(-(-x.shape[-1] // unit))
  magnitudes, zero = jnp.abs(x), jnp.zeros((), x.dtype)
  of_units = [
    jnp.max(jnp.where(unit_of_value == i, magnitudes, zero), axis=-1, keepdims=True)
    for i in range(len(units))
  ]
  absmax = zero
  for size, has_size in zip(scaling.sizes, scaling.has_size):
    count = size // unit
    for first in range(0, len(units), count):
      largest = functools.reduce(jnp.maximum, of_units[first : first + count])
      is_of_block = units // count == first // count
      absmax = jnp.where(has_size & is_of_block, largest, absmax)
  return jnp.expand_dims(absmax.astype(jnp.float32), axis=-2)


def _spread(of_units, length, unit):
  """Numbers of units, as often as there are values in each, up to a length."""
  unit_of_value = jnp.arange(length) // unit
  first, *others = jnp.split(of_units, of_units.shape[-1], axis=-1)
  spread = jnp.broadcast_to(first, (*of_units.shape[:-1], length))
  for i, number in enumerate(others, 1):
    spread = jnp.where(unit_of_value == i, number, spread)
  return spread


def _absmax_split(x, scaling, layout):
  axis, unit = layout.axis, layout.size
  values = _split_units(x, layout)
  absmax = jnp.max(jnp.abs(values.astype(jnp.float32)), axis=axis + 2)
  return sum(
    jnp.where(has_size, _largest_of_every(size // unit, absmax, axis + 1), 0.0)
    for size, has_size in zip(scaling.sizes, scaling.has_size)
  )


def _split_units(x, layout):
  """Splits the axis into [groups, units, unit], last units filled with zeros."""
  axis, groups, unit = layout
  shape = (*x.shape[:axis], groups, x.shape[axis] // groups, *x.shape[axis + 1 :])
  # XLA for TPUs would move the reshape behind what is computed of its result, and then
  # write magnitudes and scales to memory, as long as the tensor and in float32, and
  # read them again. As it stands no byte moves for it.
  return lax.optimization_barrier(_split(x.reshape(shape), axis + 1, unit))


def _largest_of_every(count, absmax, axis):
  """The largest of every `count` units along an axis, each as often as these."""
  if count == 1:
    return absmax
  largest = jnp.max(_split(absmax, axis, count), axis=axis + 1, keepdims=True)
  spread = (*largest.shape[: axis + 1], count, *largest.shape[axis + 2 :])
  largest = _merge(jnp.broadcast_to(largest, spread), axis)
  return lax.slice_in_dim(largest, 0, absmax.shape[axis], axis=axis)


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
