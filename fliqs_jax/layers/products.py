"""The products that Flax's layers compute, from the arguments of the lax operations."""

import functools
from typing import Any

from flax.linen.linear import canonicalize_padding
import jax
from jax import lax
import jax.numpy as jnp
import opt_einsum

from fliqs_jax.layers.layer import PAIR, Layer
from fliqs_jax.numerics.blocks import Contraction
from fliqs_jax.numerics.convolutions import Convolution
from fliqs_jax.numerics.masking import Axes
from fliqs_jax.numerics.products import Product


def convolution(lhs, rhs, window_strides, padding, **kwargs) -> Product:
  """Returns the product of `nn.Conv`; arguments are `lax.conv_general_dilated`'s."""
  dimensions = lax.conv_dimension_numbers(
    lhs.shape, rhs.shape, kwargs.pop('dimension_numbers', None)
  )
  function = Convolution(
    window_strides=window_strides,
    padding=padding,
    dimension_numbers=dimensions,
    **kwargs,
  )
  out_axis, feature_axis = dimensions.rhs_spec[0], dimensions.out_spec[1]
  scale_shape = [1] * lhs.ndim
  scale_shape[feature_axis] = rhs.shape[out_axis]
  axes = Axes(
    x_inputs=dimensions.lhs_spec[1],
    w_inputs=dimensions.rhs_spec[1],
    w_outputs=out_axis,
    w_space=dimensions.rhs_spec[2:],
  )
  contraction = Contraction(
    axes.x_inputs, axes.w_inputs, kwargs.get('feature_group_count', 1)
  )
  contracted = _others(rhs, out_axis)
  return Product(
    'conv',
    function,
    contracted,
    tuple(scale_shape),
    axes,
    contraction,
    x_kept=(dimensions.lhs_spec[0],) if dimensions.out_spec[0] == 0 else (),
  )


def dot_general(lhs, rhs, dimension_numbers, precision=None) -> Product:
  """Returns the product of `nn.Dense`; arguments are `lax.dot_general`'s."""
  function = functools.partial(
    lax.dot_general, dimension_numbers=dimension_numbers, precision=precision
  )
  (lhs_contracting, rhs_contracting), (lhs_batch, rhs_batch) = dimension_numbers
  # The output's axes are those of the batch, then lhs's own, then rhs's own; this
  # is also their order in rhs, as Flax lays kernels out.
  lhs_own = [a for a in range(lhs.ndim) if a not in (*lhs_contracting, *lhs_batch)]
  kept = [a for a in range(rhs.ndim) if a not in rhs_contracting]
  own = [a for a in kept if a not in rhs_batch]
  batch_shape = tuple(rhs.shape[a] for a in rhs_batch)
  scale_shape = batch_shape + (1,) * len(lhs_own) + tuple(rhs.shape[a] for a in own)
  axes = Axes(lhs.ndim - 1, 0, rhs.ndim - 1, ())  # those of `nn.Dense`
  # Blocks lie along the innermost of several axes.
  contraction = Contraction(lhs_contracting[-1], rhs_contracting[-1])
  return Product(
    'dense',
    function,
    tuple(rhs_contracting),
    scale_shape,
    axes,
    contraction,
    x_kept=(*lhs_batch, *lhs_own),
  )


def einsum(x: jax.Array, w: jax.Array, equation: str) -> Product:
  """Returns the product of `nn.Einsum`.

  Args:
    x: the input.
    w: the kernel.
    equation: of these two operands.
  """
  operands, result, _ = opt_einsum.parser.parse_einsum_input(
    (equation.replace(' ', ''), x, w)
  )
  inputs, kernel = operands.split(',')
  contracted = tuple(i for i, axis in enumerate(kernel) if axis not in result)
  shared = [i for i in contracted if kernel[i] in inputs]
  return Product(
    'einsum',
    functools.partial(_einsum, equation=equation),
    contracted,
    contraction=Contraction(inputs.index(kernel[shared[-1]]), shared[-1])
    if shared
    else None,
    x_kept=tuple(i for i, axis in enumerate(inputs) if axis in result),
  )


def _einsum(x, w, *, equation):
  return jnp.einsum(equation, x, w)


def transposed_convolution(
  w: jax.Array,
  strides: tuple[int, ...],
  padding: str | tuple[tuple[int, int], ...],
  rhs_dilation: tuple[int, ...],
  transpose_kernel: bool,
) -> Product:
  """Returns the product of `nn.ConvTranspose`.

  Args:
    w: the kernel.
    strides: of the layer.
    padding: of the layer.
    rhs_dilation: the dilation of its kernel.
    transpose_kernel: whether the kernel's last axis is the input's.
  """
  function = functools.partial(
    lax.conv_transpose,
    strides=strides,
    padding=padding,
    rhs_dilation=rhs_dilation,
    transpose_kernel=transpose_kernel,
  )
  last, second_last = w.ndim - 1, w.ndim - 2
  inputs, outputs = (last, second_last) if transpose_kernel else (second_last, last)
  return Product(
    'conv_transpose',
    function,
    _others(w, outputs),
    contraction=Contraction(last, inputs),
    x_kept=(0,),
  )


def rebuilt(layer: Layer) -> Product:
  """Returns the product that a layer computes."""
  x = jax.ShapeDtypeStruct(layer.input_shape, jnp.float32)
  w = jax.ShapeDtypeStruct(layer.kernel_shape, jnp.float32)
  arguments = dict(layer.arguments)
  if layer.kind == 'conv':
    return convolution(x, w, **arguments)
  if layer.kind in ('dense', PAIR):
    return dot_general(x, w, **arguments)
  if layer.kind == 'einsum':
    return einsum(x, w, **arguments)
  return transposed_convolution(w, **arguments)


def transposed_convolution_arguments(layer: Any) -> dict[str, Any]:
  """Returns the arguments of `transposed_convolution` for a layer of either interface.

  Args:
    layer: `nn.ConvTranspose` or `nnx.ConvTranspose`.
  """
  size = layer.kernel_size
  rank = 1 if isinstance(size, int) else len(size)

  def each(value):
    return (value or 1,) * rank if isinstance(value, int | None) else tuple(value)

  padding = canonicalize_padding(layer.padding, rank)
  return {
    'strides': each(layer.strides),
    'padding': 'VALID' if padding == 'CIRCULAR' else padding,
    'rhs_dilation': each(layer.kernel_dilation),
    'transpose_kernel': layer.transpose_kernel,
  }


def _others(array, axis):
  return tuple(a for a in range(array.ndim) if a != axis)
