"""Quantized products: what a layer computes with its formats, as functions of arrays.

    y, statistics = quantized_layer(product, x, w, formats, statistics)

An interface of Flax keeps the state; all of its arithmetic is here.
"""

from collections.abc import Callable, Sequence
import functools
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from fliqs_jax.numerics.blocks import Contraction
from fliqs_jax.numerics.calibration import (
  Quantizer,
  Statistics,
  calibrate,
  calibrate_blocks,
  moving_average,
  of_activations,
  of_weights,
  tensor_statistics,
)
from fliqs_jax.numerics.convolutions import transpose
from fliqs_jax.numerics.formats import NumericFormat, find_format
from fliqs_jax.numerics.masking import (
  ALL_SIZES,
  ActiveAxis,
  Axes,
  LayerSizes,
  active_axes,
  masked,
)


class Product(NamedTuple):
  """A bilinear product of activations and weights, and the roles of their axes."""

  kind: str  # 'conv', 'dense', 'einsum' or 'conv_transpose'
  function: Callable[..., jax.Array]  # (x, w, preferred_element_type=None) -> y
  contracted: tuple[int, ...]  # axes of w that one output channel, and its scale, spans
  scale_shape: tuple[int, ...] = ()  # in which these scales broadcast against y
  axes: Axes | None = None  # None where no size of the layer can be searched
  contraction: Contraction | None = None  # None where no format has blocks
  # Axes of x that the output keeps, in the order in which it begins with them; the
  # scale of a token spans the others.
  x_kept: tuple[int, ...] = ()


class LayerFormats(NamedTuple):
  """Per-layer pair of a weight and an activation format, or of what stands for each."""

  weights: NumericFormat
  activations: NumericFormat


class PairStatistics(NamedTuple):
  """Statistics of the two operands of a product of activations."""

  x: Statistics
  w: Statistics


def quantized_layer(
  product: Product,
  x: jax.Array,
  w: jax.Array,
  formats: LayerFormats | None,
  statistics: Statistics | None,
  sizes: LayerSizes = ALL_SIZES,
  calibration: str = 'rms',
  momentum: float = 0.95,
  activation_scale: str = 'tensor',
) -> tuple[jax.Array, Statistics | None]:
  """Returns `product(x, w)` with quantized operands, and the new statistics of `x`.

  The moving averages set the clipping threshold of the *next* calls; before the first
  update, activations stay as they are.

  Where sizes of the layer are searched, what lies outside of those in use is masked in
  the weights, in the forward and so in the backward pass, and left out of all
  statistics. A skipped layer computes, but keeps its statistics as they are.

  Args:
    product: what is computed.
    x: activations in the compute dtype, which is that of the result.
    w: weights in the parameters' own dtype.
    formats: None computes in floating point and keeps the statistics.
    statistics: moving averages, of shape `()`; None where none are kept, and the input
      at hand sets its own threshold.
    sizes: those in use, int32[], of an architecture that is searched.
    calibration: one of `calibration.LAYER_CALIBRATIONS`.
    momentum: of the moving averages.
    activation_scale: one of `calibration.ACTIVATION_SCALES`. `tensor`: one scale, set
      by the moving averages. `token`: one for each row along the contraction, set by
      the row at hand; in convolutions, which mix positions, one for each example.
  """
  x_active, w_active = active_axes(sizes, product.axes, x, w)
  w = masked(w, w_active)
  if formats is None:
    return product.function(x, w.astype(x.dtype)), statistics
  measure = functools.partial(_measured, x, x_active)
  y = quantized_product(
    product.function,
    product.scale_shape,
    product.x_kept,
    x,
    w,
    activation_quantizer(
      product, x, w, formats, statistics, x_active, calibration, activation_scale
    ),
    _weight_quantizer(formats, w, product, w_active, calibration),
  )
  if statistics is None:
    return y, None
  return y, moving_average(statistics, measure(), momentum, sizes.present)


def quantized_operands(
  product: Product,
  x: jax.Array,
  w: jax.Array,
  formats: LayerFormats | None,
  statistics: Statistics | None,
  sizes: LayerSizes = ALL_SIZES,
  calibration: str = 'rms',
  momentum: float = 0.95,
  activation_scale: str = 'tensor',
) -> tuple[tuple[jax.Array, jax.Array], Statistics | None]:
  """Returns the rounded operands of a product that is computed elsewhere.

  For layers that have no hook for their product: both operands are rounded, scales
  included, and are then multiplied as they are. The arguments are `quantized_layer`'s.
  """
  x_active, w_active = active_axes(sizes, product.axes, x, w)
  w = masked(w, w_active)
  if formats is None:
    return (x, w.astype(x.dtype)), statistics
  measure = functools.partial(_measured, x, x_active)
  x_quantizer = activation_quantizer(
    product, x, w, formats, statistics, x_active, calibration, activation_scale
  )
  w_quantizer = _weight_quantizer(formats, w, product, w_active, calibration)
  if statistics is not None:
    statistics = moving_average(statistics, measure(), momentum, sizes.present)
  rounded = fake_quantize(x, x_quantizer), fake_quantize(w, w_quantizer)
  return tuple(operand.astype(x.dtype) for operand in rounded), statistics


def quantized_pair_product(
  product: Product,
  x: jax.Array,
  w: jax.Array,
  formats: LayerFormats,
  statistics: PairStatistics | None,
  calibrations: tuple[str, str] = ('rms', 'rms'),
  momentum: float = 0.95,
  activation_scale: str = 'tensor',
) -> tuple[jax.Array, PairStatistics | None]:
  """Returns `product(x, w)` of two activations, and the new statistics of both.

  Each operand has a scale from statistics of its own, and before their first update
  stays as it is. That of `w` is one for the tensor, whatever `activation_scale` says:
  set by the values at hand, it would tell a token of causal attention of later ones.

  Args:
    product: what is computed.
    x: activations in the compute dtype, which is that of the result.
    w: other activations, in the place of weights.
    formats: that of `weights` is the format of `w`.
    statistics: as in `quantized_layer`, of each operand.
    calibrations: of each operand, of `calibration.LAYER_CALIBRATIONS`.
    momentum: as in `quantized_layer`.
    activation_scale: as in `quantized_layer`, of `x`.
  """
  measured = PairStatistics(_measured(x, ()), _measured(w, ()))
  given = measured if statistics is None else statistics
  x_calibration, w_calibration = calibrations
  y = quantized_product(
    product.function,
    (),
    product.x_kept,
    x,
    w,
    activation_quantizer(
      product, x, w, formats, given.x, (), x_calibration, activation_scale
    ),
    _second_quantizer(formats, w, given.w, product, w_calibration),
  )
  if statistics is None:
    return y, None
  averages = (moving_average(*pair, momentum) for pair in zip(statistics, measured))
  return y, PairStatistics(*averages)


def activation_quantizer(
  product: Product,
  x: jax.Array,
  w: jax.Array,
  formats: LayerFormats,
  statistics: Statistics | None,
  active: Sequence[ActiveAxis] = (),
  calibration: str = 'rms',
  activation_scale: str = 'tensor',
) -> Quantizer:
  """Returns the quantizer of a layer's input.

  Args:
    product: what is computed.
    x: the input.
    w: the weights, of which only the shape is read.
    formats: of the layer.
    statistics: as in `quantized_layer`.
    active: the parts of the axes of `x` that count.
    calibration: as in `quantized_layer`.
    activation_scale: as in `quantized_layer`.
  """
  calibration = of_activations(calibration)
  given = _given(activation_scale, x, active, product, statistics)
  format = _if_seen(formats.activations, given)
  if not _can_have_blocks(format, product, w):
    return calibrate(format._replace(blocks=None), *given, calibration)
  axis, groups = product.contraction.x_axis, product.contraction.groups
  return calibrate_blocks(x, format, *given, calibration, axis, groups)


def _given(activation_scale, x, active, product, statistics):
  """Returns the statistics that set the threshold, or those of each token."""
  if activation_scale == 'token':
    spanned = tuple(a for a in range(x.ndim) if a not in product.x_kept)
    return _measured(x, active, spanned)
  return _measured(x, active) if statistics is None else statistics


def _measured(x, active, axes=None):
  return tensor_statistics(masked(x, active), axes, active)


def _second_quantizer(formats, w, statistics, product, calibration):
  calibration = of_activations(calibration)
  format = _if_seen(formats.weights, statistics)
  if not _can_have_blocks(format, product, w):
    return calibrate(format._replace(blocks=None), *statistics, calibration)
  axis = product.contraction.w_axis
  return calibrate_blocks(w, format, *statistics, calibration, axis)


def _if_seen(format, statistics):
  """Returns the format, or float32 for a tensor of which nothing is known yet."""
  seen = functools.partial(jnp.where, statistics.absmax > 0)
  sizes = format.blocks.sizes if format.blocks else ()
  return jax.tree.map(seen, format, find_format('float32').row_among(sizes))


def _weight_quantizer(formats, w, product, active, calibration):
  statistics = tensor_statistics(w, product.contracted, active)
  format, calibration = formats.weights, of_weights(calibration)
  if not _can_have_blocks(format, product, w):
    return calibrate(format._replace(blocks=None), *statistics, calibration)
  axis = product.contraction.w_axis
  return calibrate_blocks(w, format, *statistics, calibration, axis)


def _can_have_blocks(format, product, w):
  """Returns whether a format can have blocks that fit the layer; static."""
  if format.blocks is None or product.contraction is None:
    return False
  return w.shape[product.contraction.w_axis] >= min(format.blocks.sizes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def quantized_product(
  product,
  scale_shape,
  x_kept,
  x: jax.Array,
  w: jax.Array,
  x_quantizer: Quantizer,
  w_quantizer: Quantizer,
) -> jax.Array:
  """Returns `product(q_x, q_w) · s_x · s_w`, the codes unscaled in the matrix unit.

  Codes of up to 8 bits are exact in bfloat16, so with bfloat16 operands and float32
  accumulation the result is what low-precision hardware computes. Scales of blocks
  cannot be applied to the output, so codes are multiplied with them before: exact in
  bfloat16 for scales that are powers of two and for e2m1 with scales in E4M3, else
  rounded to it. The backward pass is the clipped straight-through estimator. It saves
  `x` and `w`, and recomputes the codes, which would cost as much memory as the
  activations again.

  Args:
    product: `(x, w, preferred_element_type) -> y`, bilinear.
    scale_shape: the shape in which the weights' scales broadcast against `y`.
    x_kept: axes of `x` with which `y` begins, of a scale for each token.
    x: activations, whose dtype is the compute dtype and that of the result.
    w: weights, float32, cast to the compute dtype as codes.
    x_quantizer: with one scale, shape `()`, or one for each token, broadcastable
      against `x`.
    w_quantizer: with one scale for each output channel, broadcastable against `w`.
  """
  q_x = x_quantizer.multiplicands(x).astype(x.dtype)
  q_w = w_quantizer.multiplicands(w).astype(x.dtype)
  accumulated = jnp.promote_types(x.dtype, jnp.float32)
  y = product(q_x, q_w, preferred_element_type=accumulated)
  x_scale = against_output(x_quantizer.scale, x_kept, y.ndim)
  scale = x_scale * w_quantizer.scale.reshape(scale_shape)
  return (y * scale).astype(x.dtype)


def against_output(x_scale: jax.Array, x_kept: tuple[int, ...], ndim: int) -> jax.Array:
  """Returns scales that broadcast against x as such that broadcast against y.

  Args:
    x_scale: `()`, or broadcastable to x.
    x_kept: axes of x with which y begins.
    ndim: of y.
  """
  if x_scale.ndim == 0:
    return x_scale
  spanned = [a for a in range(x_scale.ndim) if a not in x_kept]
  shape = [x_scale.shape[a] for a in x_kept] + [1] * (ndim - len(x_kept))
  return x_scale.transpose(*x_kept, *spanned).reshape(shape)


def _quantized_product_forward(
  product, scale_shape, x_kept, x, w, x_quantizer, w_quantizer
):
  y = quantized_product(product, scale_shape, x_kept, x, w, x_quantizer, w_quantizer)
  return y, (x, w, x_quantizer, w_quantizer)


def _quantized_product_backward(product, scale_shape, x_kept, residuals, y_bar):
  """`∂L/∂x = 1[|x| ≤ t_x] · Pᵀ(ȳ, q_w s_w)`, `∂L/∂w = 1[|w| ≤ t_w] · s_x · Pᵀ(q_x, ȳ)`.

  The output's scale cancels one operand's own scale against the derivative of its
  codes, so that no tensor of activations is multiplied by scales.
  """
  del scale_shape
  x, w, x_quantizer, w_quantizer = residuals
  x_quantizer = _computing_anew(x_quantizer)
  dtype = x.dtype
  q_x = x_quantizer.multiplicands(x).astype(dtype)
  w_values = w_quantizer.values(w).astype(dtype)
  x_bar = transpose(product, (q_x, w_values), 0, y_bar)
  x_scale = x_quantizer.scale
  if x_scale.ndim:  # of tokens, over which the gradient of the weights sums
    y_bar = (y_bar * against_output(x_scale, x_kept, y_bar.ndim)).astype(dtype)
    x_scale = 1.0
  w_bar = transpose(product, (q_x, w_values), 1, y_bar)
  x_bar = jnp.where(x_quantizer.inside(x), x_bar, 0)
  # Else XLA keeps `w / s_w`, a copy of all weights, from the forward pass until devices
  # have summed this gradient.
  w_inside = _computing_anew(w_quantizer).inside(w)
  w_bar = jnp.where(w_inside, w_bar * x_scale, 0)
  return x_bar, w_bar.astype(w.dtype), None, None


def _computing_anew(quantizer):
  """Returns the quantizer, from which XLA for TPUs computes anew in the backward pass.

  Otherwise it takes the codes of the forward pass, and where they follow from more than
  a ReLU, as from a GELU, keeps them in memory until then. On CPUs codes are written to
  memory in any case, and once is faster.
  """
  scale = lax.platform_dependent(
    quantizer.scale, tpu=lax.optimization_barrier, default=lambda scale: scale
  )
  return quantizer._replace(scale=scale)


quantized_product.defvjp(_quantized_product_forward, _quantized_product_backward)


@jax.custom_vjp
def fake_quantize(x: jax.Array, quantizer: Quantizer) -> jax.Array:
  """Returns the quantizer's values, with clipped straight-through gradients."""
  return quantizer.values(x)


def _fake_quantize_forward(x, quantizer):
  return fake_quantize(x, quantizer), (x, quantizer)


def _fake_quantize_backward(residuals, y_bar):
  x, quantizer = residuals
  return jnp.where(quantizer.inside(x), y_bar, 0).astype(x.dtype), None


fake_quantize.defvjp(_fake_quantize_forward, _fake_quantize_backward)
