"""Convolutions as bilinear products, and their transposes as CPUs compute them fast.

XLA's CPU compiler has fast kernels for convolutions whose operands and result have
their features as the last axis. It brings others to that layout, but not within loops:
in a scan over samples the gradients of a convolution took over twenty times as long.
"""

from collections.abc import Callable
import functools
from typing import Any

import jax
from jax import lax
import numpy as np


class Convolution(functools.partial):
  """`lax.conv_general_dilated` with all of its arguments but the operands."""

  def __new__(cls, **arguments: Any) -> 'Convolution':
    return super().__new__(cls, lax.conv_general_dilated, **arguments)


def transpose(
  product: Callable, operands: tuple[jax.Array, jax.Array], to: int, y_bar: jax.Array
) -> jax.Array:
  """Returns what the transpose of a bilinear product makes of `y_bar`.

  Args:
    product: `(x, w) -> y`.
    operands: x and w; of the one that is transposed to, the shape and dtype are read.
    to: the index of that operand.
    y_bar: in the shape and dtype of y.

  Returns:
    An array in the shape of `operands[to]`.
  """

  def plain(operands, y_bar):
    return _transpose(product, operands, to, y_bar)

  def features_last(operands, y_bar):
    old = product.keywords['dimension_numbers']
    new = _NUMBERS[to](y_bar.ndim - 1)
    moved = [_moved(*pair) for pair in zip(operands, old[:2], new[:2], strict=True)]
    y_bar = _moved(y_bar, old.out_spec, new.out_spec)
    within = Convolution(**product.keywords | {'dimension_numbers': new})
    return _moved(_transpose(within, moved, to, y_bar), new[to], old[to])

  if isinstance(product, Convolution):
    return lax.platform_dependent(operands, y_bar, cpu=features_last, default=plain)
  return plain(operands, y_bar)


def _transpose(product, operands, to, y_bar):
  def of_one(operand):
    return product(*operands[:to], operand, *operands[to + 1 :])

  (result,) = jax.linear_transpose(of_one, operands[to])(y_bar)
  return result


def _of_x(last):
  """The transpose to x takes the inputs of the kernel for its outputs."""
  first = (0, last, *range(1, last))
  return lax.ConvDimensionNumbers(first, (last - 1, last, *range(last - 1)), first)


def _of_w(last):
  """The transpose to w sums over examples, which are the features of its operands."""
  swapped = (last, 0, *range(1, last))
  return lax.ConvDimensionNumbers(swapped, swapped, (last - 1, last, *range(last - 1)))


# For the number of the last axis, those whose transpose has its features last.
_NUMBERS = (_of_x, _of_w)


def _moved(array, old, new):
  """Returns an array whose axes have the roles of `new` in place of those of `old`."""
  return array.transpose([old[i] for i in np.argsort(new)])
