"""Quantized operators for the hooks of Flax's own layers.

    nn.Conv(..., **conv_hooks())
    nn.Dense(..., **dense_hooks())

make a layer compute with quantized weights and activations. The layer reads its
formats from the collection `formats`, bound by `SearchSpace.bind`, and without them
computes in floating point.
"""

import functools
import math
from typing import Any, NamedTuple

from flax import linen as nn
from flax.linen.dtypes import canonicalize_dtype, promote_dtype
import jax
from jax import lax
import jax.numpy as jnp

from fliqs_jax.numerics import quantizers
from fliqs_jax.layers.architecture import FORMATS, SIZES, LayerSizes
from fliqs_jax.numerics.formats import get_format
from fliqs_jax.numerics.quantizers import Quantizer

LAYER_FORMATS = 'layer'  # its variables, each a `LayerFormats`
QUANT_STATS = 'quant_stats'  # the collection of activation statistics
_STATISTICS = ('mean_square', 'absmax')  # its variables, moving averages


class LayerFormats(NamedTuple):
  """Something of each operand of a layer: its format, in the collection `formats`."""

  weights: Any
  activations: Any


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def quantized_product(
  product,
  scale_shape,
  x: jax.Array,
  w: jax.Array,
  x_quantizer: Quantizer,
  w_quantizer: Quantizer,
) -> jax.Array:
  """Returns `product(q_x, q_w) · s_x · s_w`, the codes unscaled in the matrix unit.

  Codes of up to 8 bits are exact in bfloat16, so with bfloat16 operands and float32
  accumulation the result is what low-precision hardware computes. The backward pass
  is the clipped straight-through estimator. It saves `x` and `w`, and recomputes the
  codes, which would cost as much memory as the activations again.

  Args:
    product: `(x, w, preferred_element_type) -> y`, bilinear.
    scale_shape: the shape in which the weights' scales broadcast against `y`.
    x: activations, whose dtype is the compute dtype and that of the result.
    w: weights, float32, cast to the compute dtype as codes.
    x_quantizer: with one scale, shape `()`.
    w_quantizer: with one scale for each output channel, broadcastable against `w`.
  """
  codes = x_quantizer.codes(x).astype(x.dtype), w_quantizer.codes(w).astype(x.dtype)
  y = product(*codes, preferred_element_type=jnp.float32)
  scale = x_quantizer.scale * w_quantizer.scale.reshape(scale_shape)
  return (y * scale).astype(x.dtype)


def _quantized_product_forward(product, scale_shape, x, w, x_quantizer, w_quantizer):
  y = quantized_product(product, scale_shape, x, w, x_quantizer, w_quantizer)
  return y, (x, w, x_quantizer, w_quantizer)


def _quantized_product_backward(product, scale_shape, residuals, y_bar):
  """`∂L/∂x = 1[|x| ≤ t_x] · Pᵀ(ȳ, q_w s_w)`, `∂L/∂w = 1[|w| ≤ t_w] · s_x · Pᵀ(q_x, ȳ)`.

  The output's scale cancels one operand's own scale against the derivative of its
  codes, so that no tensor of activations is multiplied by scales.
  """
  del scale_shape
  x, w, x_quantizer, w_quantizer = residuals
  dtype = x.dtype
  x_codes = x_quantizer.codes(x).astype(dtype)
  w_values = (w_quantizer.codes(w) * w_quantizer.scale).astype(dtype)
  (x_bar,) = jax.linear_transpose(lambda a: product(a, w_values), x_codes)(y_bar)
  (w_bar,) = jax.linear_transpose(lambda b: product(x_codes, b), w_values)(y_bar)
  x_bar = jnp.where(x_quantizer.inside(x), x_bar, 0)
  w_bar = jnp.where(w_quantizer.inside(w), w_bar * x_quantizer.scale, 0)
  return x_bar, w_bar.astype(w.dtype), None, None


quantized_product.defvjp(_quantized_product_forward, _quantized_product_backward)


class Axes(NamedTuple):
  """Where the channels and the extents in space are."""

  x_inputs: int  # axis of the activations, and of the outputs
  w_inputs: int  # axes of the weights
  w_outputs: int
  w_space: tuple[int, ...]


class QuantizedOperator(nn.Module):
  """Quantizes the two operands of a product by the formats bound to its layer.

  Where sizes of the layer are searched, what lies outside the chosen ones is masked in
  the weights, in the forward and so in the backward pass, and left out of all
  statistics. The activations need no mask of their own: channels beyond the chosen ones
  hold something finite, which meets weights of zero. A skipped layer computes, but
  keeps its statistics as they are.

  Keeps moving averages of the input's mean square and absolute maximum in the
  collection `quant_stats`, updated wherever that collection is mutable. They set the
  clipping threshold of the *next* steps; until there are any, activations stay as
  they are. Within a transformation that does not carry the collection, as `nn.scan`
  does only if its `variable_axes` name it, the input at hand sets its own threshold.

  Attributes:
    calibration: one of `quantizers.CALIBRATIONS`.
    momentum: of the moving averages.
    formats: the layer's formats; None reads them from the collection `formats`.
    sizes: what is searched of the layer's sizes, as tables; integers are not.
  """

  calibration: str = 'rms'
  momentum: float = 0.95
  formats: LayerFormats | None = None
  sizes: LayerSizes = LayerSizes()

  def compute(self, product, x, w, contracted_axes, scale_shape, axes):
    """Applies `product` to `x` and `w`, quantized where formats are bound.

    Args:
      product: `(x, w, preferred_element_type=None) -> y`, bilinear.
      x: activations.
      w: weights in the parameters' own dtype.
      contracted_axes: the axes of `w` that one output channel, and its scale, spans.
      scale_shape: the shape in which these scales broadcast against `y`.
      axes: an `Axes`.
    """
    chosen = LayerSizes()
    if self.has_variable(FORMATS, SIZES):
      chosen = self.get_variable(FORMATS, SIZES)
    x_active, w_active = _active_parts(chosen, x, w, axes)
    w = masked(w, w_active)
    operand_quantizers = self._operand_quantizers(
      x, w, contracted_axes, x_active, w_active
    )
    if operand_quantizers is None:
      return product(x, w.astype(x.dtype))
    y = quantized_product(product, scale_shape, x, w, *operand_quantizers)
    self._update_statistics(x, x_active, chosen.present)
    return y

  @nn.nowrap
  def count_macs(self, x, w, y, contracted_axes) -> int:
    """Returns the multiply-accumulates of `y = product(x, w)`, from the shapes."""
    del x
    return y.size * math.prod(w.shape[axis] for axis in contracted_axes)

  def _operand_quantizers(self, x, w, contracted_axes, x_active=(), w_active=()):
    """Returns the quantizers of `x` and of `w`, or None where no formats are bound."""
    has_averages = self._declare_statistics()
    formats = self.formats
    if formats is None and self.has_variable(FORMATS, LAYER_FORMATS):
      formats = self.get_variable(FORMATS, LAYER_FORMATS)
    if formats is None:
      return None
    if has_averages:
      statistics = (self.get_variable(QUANT_STATS, name) for name in _STATISTICS)
    else:
      statistics = _statistics(masked(x, x_active), None, x_active)
    return (
      self._activation_quantizer(formats.activations, *statistics),
      self._weight_quantizer(formats.weights, w, contracted_axes, w_active),
    )

  def _declare_statistics(self):
    """Returns whether there are moving averages, or can be, at this place."""
    if not self.is_mutable_collection(QUANT_STATS):
      return self.has_variable(QUANT_STATS, _STATISTICS[0])
    for name in _STATISTICS:
      self.variable(QUANT_STATS, name, jnp.zeros, ())
    return True

  def _update_statistics(self, x, active=(), present=None):
    if self.is_mutable_collection(QUANT_STATS):
      statistics = _statistics(masked(x, active), None, active)
      for name, new in zip(_STATISTICS, statistics):
        old = self.get_variable(QUANT_STATS, name)
        self.put_variable(QUANT_STATS, name, self._average(old, new, present))

  def _activation_quantizer(self, format, mean_square, absmax):
    # Nothing is known of a tensor that was not seen yet.
    format = jax.tree.map(
      functools.partial(jnp.where, absmax > 0), format, get_format('float32')
    )
    return quantizers.calibrate(format, mean_square, absmax, self.calibration)

  def _weight_quantizer(self, format, w, axes, active):
    statistics = _statistics(w, axes, active)
    return quantizers.calibrate(format, *statistics, self.calibration)

  def _average(self, old, new, present):
    momentum = jnp.where(old > 0, self.momentum, 0.0)
    average = momentum * old + (1 - momentum) * new
    return average if present is None else jnp.where(present > 0, average, old)


class Active(NamedTuple):
  """The part of an axis that is in use."""

  axis: int
  mask: jax.Array  # bool, broadcastable against the array
  share: jax.Array  # float32[], of the axis

  @classmethod
  def first(cls, axis: int, x: jax.Array, size: jax.Array) -> 'Active':
    """Returns the first `size` of an axis of `x`."""
    return cls._where(axis, x, jnp.arange(x.shape[axis]) < size, size)

  @classmethod
  def centre(cls, axis: int, x: jax.Array, size: jax.Array) -> 'Active':
    """Returns the `size` in the middle of an axis of `x`, both odd."""
    extent = x.shape[axis]
    distance = jnp.abs(jnp.arange(extent) - extent // 2)
    return cls._where(axis, x, 2 * distance < size, size)

  @classmethod
  def _where(cls, axis, x, mask, size):
    shape = [-1 if a == axis else 1 for a in range(x.ndim)]
    return cls(axis, mask.reshape(shape), size.astype(jnp.float32) / x.shape[axis])


def _active_parts(chosen, x, w, axes):
  """The active parts of the axes of `x`, and of those of `w`, that are searched."""
  x_active, w_active = [], []
  if chosen.inputs is not None:
    x_active.append(Active.first(axes.x_inputs, x, chosen.inputs))
    if w.shape[axes.w_inputs] == x.shape[axes.x_inputs]:  # not so if depthwise
      w_active.append(Active.first(axes.w_inputs, w, chosen.inputs))
  if chosen.outputs is not None:
    w_active.append(Active.first(axes.w_outputs, w, chosen.outputs))
  if chosen.kernel is not None:
    w_active += [Active.centre(axis, w, chosen.kernel) for axis in axes.w_space]
  return tuple(x_active), tuple(w_active)


def masked(x: jax.Array, active: tuple[Active, ...]) -> jax.Array:
  """Returns `x` with zeros outside the active parts of its axes."""
  if not active:
    return x
  return jnp.where(functools.reduce(jnp.logical_and, [a.mask for a in active]), x, 0)


def _statistics(x, axes, active):
  """The mean square and the absolute maximum over `axes`, kept where they are given.

  What is not active of `x` is zero and does not count.
  """
  square = jnp.square(lax.stop_gradient(x).astype(jnp.float32))
  keepdims = axes is not None
  # Both of the squares, so that a compiler reads `x` once for the two.
  mean = jnp.mean(square, axes, keepdims=keepdims)
  absmax = jnp.sqrt(jnp.max(square, axes, keepdims=keepdims))
  for axis, _, share in active:
    if axes is None or axis in axes:
      mean = mean / share
  return mean, absmax


class QuantizedConv(QuantizedOperator):
  """Quantized `lax.conv_general_dilated`, for `nn.Conv.conv_general_dilated_cls`."""

  kind = 'conv'

  @nn.compact
  def __call__(self, lhs, rhs, window_strides, padding, **kwargs):
    """The arguments are those of `lax.conv_general_dilated`."""
    dimensions = lax.conv_dimension_numbers(
      lhs.shape, rhs.shape, kwargs.pop('dimension_numbers', None)
    )
    product = functools.partial(
      lax.conv_general_dilated,
      window_strides=window_strides,
      padding=padding,
      dimension_numbers=dimensions,
      **kwargs,
    )
    out_axis, feature_axis = dimensions.rhs_spec[0], dimensions.out_spec[1]
    contracted = tuple(a for a in range(rhs.ndim) if a != out_axis)
    scale_shape = [1] * lhs.ndim
    scale_shape[feature_axis] = rhs.shape[out_axis]
    axes = Axes(
      x_inputs=dimensions.lhs_spec[1],
      w_inputs=dimensions.rhs_spec[1],
      w_outputs=out_axis,
      w_space=dimensions.rhs_spec[2:],
    )
    return self.compute(product, lhs, rhs, contracted, tuple(scale_shape), axes)


class QuantizedDotGeneral(QuantizedOperator):
  """Quantized `lax.dot_general`, for `dot_general_cls` of Flax's dense layers."""

  kind = 'dense'

  @nn.compact
  def __call__(self, lhs, rhs, dimension_numbers, precision=None):
    """The arguments are those of `lax.dot_general`."""
    product = functools.partial(
      lax.dot_general, dimension_numbers=dimension_numbers, precision=precision
    )
    (lhs_contracting, rhs_contracting), (lhs_batch, rhs_batch) = dimension_numbers
    # The output's axes are those of the batch, then lhs's own, then rhs's own; this
    # is also their order in rhs, as Flax lays kernels out.
    lhs_own = lhs.ndim - len(lhs_contracting) - len(lhs_batch)
    kept = [a for a in range(rhs.ndim) if a not in rhs_contracting]
    own = [a for a in kept if a not in rhs_batch]
    batch_shape = tuple(rhs.shape[a] for a in rhs_batch)
    scale_shape = batch_shape + (1,) * lhs_own + tuple(rhs.shape[a] for a in own)
    axes = Axes(lhs.ndim - 1, 0, rhs.ndim - 1, ())  # those of `nn.Dense`
    return self.compute(product, lhs, rhs, tuple(rhs_contracting), scale_shape, axes)


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
  """The same for `nn.Dense` and `nn.DenseGeneral`."""
  operator = functools.partial(QuantizedDotGeneral, **attributes)
  return {'dot_general_cls': operator, 'promote_dtype': promote_all_but_kernel}
