"""Channels of layers: how large what they are given is, and kernels with them scaled.

The products are those that `moments.is_covered` covers. The n inputs of a dense layer
are its contracted axes, flattened; those of a convolution are its input channels.
"""

import jax
import jax.numpy as jnp

from fliqs_jax.layers.moments import as_matrix
from fliqs_jax.numerics.products import Product


def input_magnitudes(product: Product, x: jax.Array) -> jax.Array:
  """Returns the largest magnitude of each of the inputs of a layer, float32[n].

  Args:
    product: one that is covered.
    x: what its layer is given.
  """
  if product.kind == 'dense':
    (channels, _), _ = product.function.keywords['dimension_numbers']
  else:
    channels = (product.axes.x_inputs,)
  others = [a for a in range(x.ndim) if a not in channels]
  moved = jnp.abs(x).transpose(*channels, *others)
  largest = jnp.max(moved, axis=tuple(range(len(channels), x.ndim)))
  return largest.reshape(-1).astype(jnp.float32)


def weight_magnitudes(product: Product, w: jax.Array, count: int) -> jax.Array:
  """Returns the largest magnitude of the weights of each of n inputs, float32[n].

  Args:
    product: one that is covered.
    w: the kernel.
    count: n.
  """
  matrix, _ = as_matrix(product, w)
  return jnp.max(jnp.abs(matrix).reshape(count, -1), axis=1)


def with_inputs_scaled(product: Product, w: jax.Array, factors: jax.Array) -> jax.Array:
  """Returns a kernel with the weights of each input times a factor, float32[n]."""
  matrix, restore = as_matrix(product, w)
  # The places in the window of a convolution lie within each of its channels.
  window = len(matrix) // len(factors)
  return restore(matrix * jnp.repeat(factors, window)[:, None])


def with_outputs_scaled(
  product: Product, w: jax.Array, factors: jax.Array
) -> jax.Array:
  """Returns a kernel with the weights of each output times a factor, float32[c]."""
  matrix, restore = as_matrix(product, w)
  return restore(matrix * factors)
