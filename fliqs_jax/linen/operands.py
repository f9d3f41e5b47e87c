"""Quantized operands, for Flax's layers that have no hook for their product.

`nn.Einsum` and `nn.ConvTranspose` let us see inputs and kernel in `promote_dtype`
alone, so both are rounded there, scales included, and then multiplied as they are.
"""

import functools

from flax import linen as nn
import jax
from jax import lax
import jax.numpy as jnp
import opt_einsum

from fliqs_jax.linen.operators import QuantizedOperator
from fliqs_jax.numerics.quantizers import Quantizer


@jax.custom_vjp
def fake_quantize(x: jax.Array, quantizer: Quantizer) -> jax.Array:
  """Returns `codes(x) · scale` in float32, with clipped straight-through gradients."""
  return quantizer.codes(x) * quantizer.scale


def _forward(x, quantizer):
  return fake_quantize(x, quantizer), (x, quantizer)


def _backward(residuals, y_bar):
  x, quantizer = residuals
  return jnp.where(quantizer.inside(x), y_bar, 0).astype(x.dtype), None


fake_quantize.defvjp(_forward, _backward)


class QuantizedOperands(QuantizedOperator):
  """Rounds the operands of a product that is computed elsewhere."""

  def compute(self, product, x, w, contracted_axes):
    """Returns `x` and `w`, in the dtype of `x`, quantized where formats are bound.

    Args:
      product: `(x, w) -> y`, what the layer computes; only its shape is used.
      x: activations in the compute dtype.
      w: weights in the parameters' own dtype.
      contracted_axes: the axes of `w` that one output channel, and its scale, spans.
    """
    del product
    operand_quantizers = self._operand_quantizers(x, w, contracted_axes)
    if operand_quantizers is None:
      return x, w.astype(x.dtype)
    rounded = map(fake_quantize, (x, w), operand_quantizers)
    self._update_statistics(x)
    return tuple(operand.astype(x.dtype) for operand in rounded)


class QuantizedEinsum(QuantizedOperands):
  """The operands of `nn.Einsum`.

  Attributes:
    equation: of two operands, the input and the kernel.
  """

  kind = 'einsum'
  equation: str = ''

  @nn.compact
  def __call__(self, x: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the rounded operands."""
    operands, result, _ = opt_einsum.parser.parse_einsum_input(
      (self.equation.replace(' ', ''), x, w)
    )
    kernel = operands.split(',')[1]
    contracted = tuple(i for i, axis in enumerate(kernel) if axis not in result)
    product = functools.partial(_einsum, equation=self.equation)
    return self.compute(product, x, w, contracted)


def _einsum(x, w, *, equation):
  return jnp.einsum(equation, x, w)


class QuantizedConvTranspose(QuantizedOperands):
  """The operands of `nn.ConvTranspose`.

  Attributes:
    strides: of the layer.
    padding: of the layer.
    rhs_dilation: the dilation of its kernel.
    transpose_kernel: whether the kernel's last axis is the input's.
  """

  kind = 'conv_transpose'
  strides: tuple[int, ...] = ()
  padding: str | tuple[tuple[int, int], ...] = 'SAME'
  rhs_dilation: tuple[int, ...] = ()
  transpose_kernel: bool = False

  @nn.compact
  def __call__(self, x: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the rounded operands."""
    output_axis = w.ndim - (2 if self.transpose_kernel else 1)
    contracted = tuple(axis for axis in range(w.ndim) if axis != output_axis)
    product = functools.partial(
      lax.conv_transpose,
      strides=self.strides,
      padding=self.padding,
      rhs_dilation=self.rhs_dilation,
      transpose_kernel=self.transpose_kernel,
    )
    return self.compute(product, x, w, contracted)

  @nn.nowrap
  def count_macs(self, x, w, y, contracted_axes) -> int:
    """Each input element meets each kernel element of its channel once."""
    del y, contracted_axes
    return x.size * w.size // x.shape[-1]
