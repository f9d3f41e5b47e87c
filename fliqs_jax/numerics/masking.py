"""Masks of the parts of operands that a searched architecture leaves unused.

Channels in use are a prefix of the largest's, kernels in use its centre. Activations
need no mask of their own in a product: channels beyond those in use hold something
finite, which meets weights of zero.
"""

from collections.abc import Sequence
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Axes(NamedTuple):
  """Axes of a product's operands whose sizes an architecture can decide."""

  x_inputs: int  # of the activations, and of the outputs
  w_inputs: int  # of the weights, as the others
  w_outputs: int
  w_space: tuple[int, ...]


class LayerSizes(NamedTuple):
  """Sizes of a layer, each int32[] or a table; None where nothing is decided."""

  inputs: Any = None  # channels
  outputs: Any = None  # channels
  kernel: Any = None  # extent in space, odd
  present: Any = None  # 1, or 0 where the layer is skipped


ALL_SIZES = LayerSizes()  # of a layer that is used whole


class ActiveAxis(NamedTuple):
  """The part of an axis that is in use."""

  axis: int
  mask: jax.Array  # bool, broadcastable against the array
  share: jax.Array  # float32[], of the axis

  @classmethod
  def first(cls, axis: int, x: jax.Array, size: jax.Array) -> 'ActiveAxis':
    """Returns the first `size` of an axis of `x`."""
    return cls._where(axis, x, jnp.arange(x.shape[axis]) < size, size)

  @classmethod
  def centre(cls, axis: int, x: jax.Array, size: jax.Array) -> 'ActiveAxis':
    """Returns the `size` in the middle of an axis of `x`, both odd."""
    extent = x.shape[axis]
    distance = jnp.abs(jnp.arange(extent) - extent // 2)
    return cls._where(axis, x, 2 * distance < size, size)

  @classmethod
  def _where(cls, axis, x, mask, size):
    shape = [-1 if a == axis else 1 for a in range(x.ndim)]
    return cls(axis, mask.reshape(shape), size.astype(jnp.float32) / x.shape[axis])


def active_axes(
  sizes: LayerSizes, axes: Axes | None, x: jax.Array, w: jax.Array
) -> tuple[tuple[ActiveAxis, ...], tuple[ActiveAxis, ...]]:
  """Returns the parts in use of the axes of `x` and of `w`; of searched axes alone.

  Args:
    sizes: the sizes in use, int32[].
    axes: of the product; None where no size is searched.
    x: activations.
    w: weights.
  """
  x_active, w_active = [], []
  if sizes.inputs is not None:
    x_active.append(ActiveAxis.first(axes.x_inputs, x, sizes.inputs))
    if w.shape[axes.w_inputs] == x.shape[axes.x_inputs]:  # not so if depthwise
      w_active.append(ActiveAxis.first(axes.w_inputs, w, sizes.inputs))
  if sizes.outputs is not None:
    w_active.append(ActiveAxis.first(axes.w_outputs, w, sizes.outputs))
  if sizes.kernel is not None:
    w_active += [ActiveAxis.centre(axis, w, sizes.kernel) for axis in axes.w_space]
  return tuple(x_active), tuple(w_active)


def masked(x: jax.Array, active: Sequence[ActiveAxis]) -> jax.Array:
  """Returns `x` with zeros outside the active parts of its axes."""
  if not active:
    return x
  return jnp.where(functools.reduce(jnp.logical_and, [a.mask for a in active]), x, 0)
