"""Second moments of what layers are given, and their kernels as matrices."""

from collections.abc import Callable
import math

import jax
from jax import lax
import jax.numpy as jnp

from fliqs_jax.numerics.products import Product


def is_covered(product: Product) -> bool:
  """Returns whether a product is one of a matrix of inputs and a matrix of weights.

  Those are the products of dense layers and of convolutions without groups.
  """
  arguments = product.function.keywords if product.kind in ('dense', 'conv') else {}
  if product.kind == 'dense':
    return not any(arguments['dimension_numbers'][1])
  return product.kind == 'conv' and arguments.get('feature_group_count', 1) == 1


def second_moments(product: Product, x: jax.Array, w: jax.Array) -> jax.Array:
  """Returns the mean of `xᵀx` over the rows of inputs, float32[n, n].

  Args:
    product: one that is covered.
    x: what its layer is given; of a convolution, the patches of it are the rows.
    w: the layer's kernel, of which only the shape is read.
  """
  arguments = product.function.keywords
  if product.kind == 'dense':
    (contracted, _), _ = arguments['dimension_numbers']
    kept = [a for a in range(x.ndim) if a not in contracted]
    rows = x.transpose(*kept, *contracted)
    rows = rows.reshape(-1, math.prod(x.shape[a] for a in contracted))
  else:
    rows = _patches(product, x, w)
  rows = rows.astype(jnp.float32)
  return rows.T @ rows / len(rows)


def _patches(product, x, w):
  """The patches of a convolution's input, [positions, channels · window]."""
  arguments = product.function.keywords
  numbers = arguments['dimension_numbers']
  patches = lax.conv_general_dilated_patches(
    x,
    filter_shape=[w.shape[a] for a in numbers.rhs_spec[2:]],
    window_strides=arguments['window_strides'],
    padding=arguments['padding'],
    lhs_dilation=arguments.get('lhs_dilation'),
    rhs_dilation=arguments.get('rhs_dilation'),
    dimension_numbers=numbers,
  )
  channels = numbers.out_spec[1]
  return jnp.moveaxis(patches, channels, -1).reshape(-1, patches.shape[channels])


def as_matrix(
  product: Product, w: jax.Array
) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
  """Returns a kernel as float32[n, c], and the function from such a matrix to it.

  Args:
    product: one that is covered.
    w: the kernel, whose n inputs are in the order of `second_moments`.
  """
  arguments = product.function.keywords
  if product.kind == 'dense':
    (_, contracted), _ = arguments['dimension_numbers']
    own = [a for a in range(w.ndim) if a not in contracted]
    axes = (*contracted, *own)
  else:
    out, inputs, *window = arguments['dimension_numbers'].rhs_spec
    contracted, axes = (inputs, *window), (inputs, *window, out)
  moved = w.transpose(axes)
  inverse = [axes.index(a) for a in range(w.ndim)]

  def restore(matrix):
    return matrix.reshape(moved.shape).transpose(inverse).astype(w.dtype)

  count = math.prod(w.shape[a] for a in contracted)
  return moved.reshape(count, -1).astype(jnp.float32), restore
