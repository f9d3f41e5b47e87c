"""Quantized operators for the hooks of Flax's own layers.

    nn.Conv(..., **conv_hooks())
    nn.Dense(..., **dense_hooks())

make a layer compute with quantized weights and activations. The layer reads its
formats from the collection `formats`, made by `variables.nest`, and without them
computes in floating point.

`nn.Einsum` and `nn.ConvTranspose` have no hook for their product. They let us see
inputs and kernel in `promote_dtype` alone, so both are rounded there, scales included,
and then multiplied as they are.
"""

import functools
from typing import Any

from flax import linen as nn
from flax.linen.dtypes import canonicalize_dtype, promote_dtype
import jax
import jax.numpy as jnp

from fliqs_jax.layers import products
from fliqs_jax.layers.replacement import observer, replacement
from fliqs_jax.layers.variables import FORMATS, LAYER_FORMATS, QUANT_STATS, SIZES
from fliqs_jax.numerics.calibration import Statistics
from fliqs_jax.numerics.masking import ALL_SIZES, LayerSizes
from fliqs_jax.numerics.products import (
  LayerFormats,
  Product,
  quantized_layer,
  quantized_operands,
)


class QuantizedOperator(nn.Module):
  """Quantizes the two operands of a product by the formats bound to its layer.

  Keeps moving averages of the input's statistics in the collection `quant_stats`,
  updated wherever that collection is mutable. Within a transformation that does not
  carry the collection, as `nn.scan` does only if its `variable_axes` name it, the input
  at hand sets its own threshold.

  Subclasses describe their product and call `compute`, which discovery intercepts.

  Attributes:
    calibration: one of `calibration.LAYER_CALIBRATIONS`.
    momentum: of the moving averages.
    activation_scale: one of `calibration.ACTIVATION_SCALES`.
    formats: the layer's formats; None reads them from the collection `formats`.
    sizes: what is searched of the layer's sizes, as tables; integers are not.
  """

  calibration: str = 'rms'
  momentum: float = 0.95
  activation_scale: str = 'tensor'
  formats: LayerFormats | None = None
  sizes: LayerSizes = ALL_SIZES

  # What is computed: `quantized_layer`, or another function of the same arguments.
  arithmetic = staticmethod(quantized_layer)

  def compute(self, x: jax.Array, w: jax.Array, product: Product) -> Any:
    """Returns what `arithmetic` makes of a product, and keeps its statistics.

    Args:
      x: activations in the compute dtype.
      w: weights in the parameters' own dtype.
      product: what the layer computes.
    """
    path = '/'.join(self.path[:-1])
    if compute := replacement():
      return compute(path, x, w, product)
    if observe := observer():
      observe(path, x, w, product)
    formats, sizes = self.formats, ALL_SIZES
    if formats is None and self.has_variable(FORMATS, LAYER_FORMATS):
      formats = self.get_variable(FORMATS, LAYER_FORMATS)
    if self.has_variable(FORMATS, SIZES):
      sizes = self.get_variable(FORMATS, SIZES)
    statistics = self._statistics()
    y, updated = self.arithmetic(
      product,
      x,
      w,
      formats,
      statistics,
      sizes,
      calibration=self.calibration,
      momentum=self.momentum,
      activation_scale=self.activation_scale,
    )
    if self.is_mutable_collection(QUANT_STATS) and updated is not statistics:
      for name, value in updated._asdict().items():
        self.put_variable(QUANT_STATS, name, value)
    return y

  def _statistics(self):
    """Returns the moving averages; None where there are none, nor can be."""
    if self.is_mutable_collection(QUANT_STATS):
      for name in Statistics._fields:
        self.variable(QUANT_STATS, name, jnp.zeros, (), jnp.float32)
    if not self.has_variable(QUANT_STATS, Statistics._fields[0]):
      return None
    return Statistics(
      *(self.get_variable(QUANT_STATS, name) for name in Statistics._fields)
    )


class QuantizedConv(QuantizedOperator):
  """Quantized `lax.conv_general_dilated`, for `nn.Conv.conv_general_dilated_cls`."""

  @nn.compact
  def __call__(self, lhs, rhs, window_strides, padding, **kwargs):
    """The arguments are those of `lax.conv_general_dilated`."""
    product = products.convolution(lhs, rhs, window_strides, padding, **kwargs)
    return self.compute(lhs, rhs, product)


class QuantizedDotGeneral(QuantizedOperator):
  """Quantized `lax.dot_general`, for `dot_general_cls` of Flax's dense layers."""

  @nn.compact
  def __call__(self, lhs, rhs, dimension_numbers, precision=None):
    """The arguments are those of `lax.dot_general`."""
    product = products.dot_general(lhs, rhs, dimension_numbers, precision)
    return self.compute(lhs, rhs, product)


class QuantizedEinsum(QuantizedOperator):
  """The operands of `nn.Einsum`.

  Attributes:
    equation: of two operands, the input and the kernel.
  """

  equation: str = ''
  arithmetic = staticmethod(quantized_operands)

  @nn.compact
  def __call__(self, x: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the rounded operands."""
    return self.compute(x, w, products.einsum(x, w, self.equation))


class QuantizedConvTranspose(QuantizedOperator):
  """The operands of `nn.ConvTranspose`.

  Attributes:
    strides: of the layer.
    padding: of the layer.
    rhs_dilation: the dilation of its kernel.
    transpose_kernel: whether the kernel's last axis is the input's.
  """

  strides: tuple[int, ...] = ()
  padding: str | tuple[tuple[int, int], ...] = 'SAME'
  rhs_dilation: tuple[int, ...] = ()
  transpose_kernel: bool = False
  arithmetic = staticmethod(quantized_operands)

  @nn.compact
  def __call__(self, x: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the rounded operands."""
    product = products.transposed_convolution(
      w, self.strides, self.padding, self.rhs_dilation, self.transpose_kernel
    )
    return self.compute(x, w, product)


def promote_all_but_kernel(inputs, kernel, bias, *, dtype=None, inexact=True):
  """Flax's `promote_dtype`, but the kernel keeps the parameters' precision.

  Cast before the hook sees it, it would be rounded twice.
  """
  dtype = canonicalize_dtype(inputs, kernel, bias, dtype=dtype, inexact=inexact)
  inputs, bias = promote_dtype(inputs, bias, dtype=dtype, inexact=inexact)
  return inputs, kernel, bias


def conv_hooks(**attributes: Any) -> dict[str, Any]:
  """Returns the keyword arguments of `nn.Conv` that quantize it.

  Args:
    **attributes: of `QuantizedOperator`.
  """
  operator = functools.partial(QuantizedConv, **attributes)
  return {
    'conv_general_dilated_cls': operator,
    'promote_dtype': promote_all_but_kernel,
  }


def dense_hooks(**attributes: Any) -> dict[str, Any]:
  """Returns the same for `nn.Dense` and `nn.DenseGeneral`."""
  operator = functools.partial(QuantizedDotGeneral, **attributes)
  return {'dot_general_cls': operator, 'promote_dtype': promote_all_but_kernel}
