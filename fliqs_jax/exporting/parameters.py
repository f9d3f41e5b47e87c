"""Deployed parameters: codes and scales of each layer, and all other leaves."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from fliqs_jax.errors import ConfigError
from fliqs_jax.exporting import codes
from fliqs_jax.layers import products
from fliqs_jax.layers.layer import PAIR, Layer
from fliqs_jax.layers.parameter_products import OPERATOR
from fliqs_jax.layers.variables import QUANT_STATS
from fliqs_jax.numerics.calibration import (
  Quantizer,
  Statistics,
  calibrate,
  calibrate_blocks,
  of_activations,
  of_weights,
  tensor_statistics,
)
from fliqs_jax.numerics.formats import find_format, get_format
from fliqs_jax.search.assignments import Assignment

KERNEL = 'kernel'  # the parameter of Flax's layers that is quantized


class QuantizedLayer(NamedTuple):
  """Codes and scales of one layer, which decode to its weights.

  Attributes:
    layer: its shapes and arguments.
    weights: the name of the format of the weights.
    activations: that of its input; `float32` where nothing is known of the input.
    codes: values of the format in the narrowest type that holds them, of the kernel's
      shape, before which the axes of a stack stand whose elements a scan computes with.
    weight_scale: float32, one for each output channel, broadcastable to the codes; of a
      block format one for each element of a stack.
    block_scale: in the type of the scales of blocks, of the shape of the codes but for
      one axis, which has a scale for each block; None without blocks.
    activation_scale: float32, one for each element of a stack, 1 for formats that are
      not scaled; None where the input at hand sets it, or those of its tokens or
      blocks.
    statistics: of the input, float32 of a stack's shape each; None where none are kept.
    calibration: one of `calibration.LAYER_CALIBRATIONS`.
    shared_scale: one of `calibration.ACTIVATION_SCALES`.
  """

  layer: Layer
  weights: str
  activations: str
  codes: np.ndarray
  weight_scale: np.ndarray
  block_scale: np.ndarray | None
  activation_scale: np.ndarray | None
  statistics: Statistics | None
  calibration: str = 'rms'
  shared_scale: str = 'tensor'

  @property
  def name(self) -> str:
    """The name under which its codes are deployed."""
    return weights_name(self.layer)

  @property
  def stack(self) -> tuple[int, ...]:
    """The lengths of the axes over which a network scans; empty for most layers."""
    return self.codes.shape[: self.codes.ndim - len(self.layer.kernel_shape)]

  @property
  def block_axis(self) -> int:
    """The axis of the codes along which blocks lie, counted from the last."""
    return self.layer.contraction.w_axis - len(self.layer.kernel_shape)

  def format_beyond(self, floats: Collection[str]) -> str | None:
    """Returns a format of an operand that has blocks, or is none of these floats.

    None where both operands are integers, one of the floats, or not scaled.
    """
    for name in (self.weights, self.activations):
      format = find_format(name)
      if format.block or (format.family == 'float' and name not in floats):
        return name
    return None

  def element(self, index: int) -> 'QuantizedLayer':
    """Returns one layer of a stack, whose layers are numbered in their order."""
    axes = len(self.stack)
    part = lambda array: array.reshape(-1, *array.shape[axes:])[index]
    return self._replace(**{
      name: jax.tree.map(part, getattr(self, name))
      for name in _STACKED
    })  # fmt: skip

  def decoded(self) -> np.ndarray:
    """Returns the weights, float32."""
    values = self.codes.astype(np.float32)
    if self.block_scale is not None:
      scales, axis = self.block_scale.astype(np.float32), self.block_axis
      scales = np.repeat(scales, find_format(self.weights).block.size, axis)
      values *= scales.take(range(values.shape[axis]), axis)
    return values * self.weight_scale


# What of a layer the axes of a stack come before.
_STACKED = 'codes', 'weight_scale', 'block_scale', 'activation_scale', 'statistics'


def quantized_parameters(
  layers: Sequence[Layer],
  variables: Mapping[str, Any],
  formats: Assignment,
  calibration: str = 'rms',
  shared_scale: str = 'tensor',
  own_weights: Mapping[str, np.ndarray] | None = None,
) -> dict[str, QuantizedLayer]:
  """Returns codes and scales of every layer with weights, `{path: QuantizedLayer}`.

  Args:
    layers: of the network, from `discover`.
    variables: `params`, and `quant_stats` with statistics of the layers' inputs.
    formats: `{path: {'weights': name, 'activations': name}}`.
    calibration: one of `calibration.LAYER_CALIBRATIONS`, that of the search.
    shared_scale: one of `calibration.ACTIVATION_SCALES`, that of the search.
    own_weights: what layers multiply by that is not their kernel, by path.

  Raises:
    ConfigError: where a layer's weights are not one parameter; one line for each.
  """
  params = traverse_util.flatten_dict(variables['params'], sep='/')
  statistics = traverse_util.flatten_dict(variables.get(QUANT_STATS, {}), sep='/')
  quantized, problems = {}, []
  for layer in layers:
    if layer.kind == PAIR:
      continue
    kernel = (own_weights or {}).get(layer.path, params.get(weights_name(layer)))
    shape = np.shape(kernel)[-len(layer.kernel_shape) :]
    if kernel is None or shape != layer.kernel_shape:
      found = 'none' if kernel is None else str(np.shape(kernel))
      problems.append(
        f'layer {layer.path!r} multiplies by weights {layer.kernel_shape} that are not '
        f'its parameter {KERNEL!r} ({found}): expected one, not made from several'
      )
      continue
    operator = _join(layer.path, layer.operator)
    kept = [statistics.get(f'{operator}/{name}') for name in Statistics._fields]
    has_statistics = all(value is not None for value in kept)
    quantized[layer.path] = _quantized_layer(
      layer,
      np.asarray(kernel),
      Statistics(*map(np.asarray, kept)) if has_statistics else None,
      formats[layer.path],
      calibration,
      shared_scale,
    )
  if problems:
    raise ConfigError(*problems)
  return quantized


def weights_name(layer: Layer) -> str:
  """Returns the name under which the weights of a layer are deployed.

  That of its parameter, or, as a product by itself multiplies, below it.
  """
  is_product = layer.operator == OPERATOR
  return _join(layer.path, OPERATOR if is_product else KERNEL)


def unquantized(
  layers: Sequence[Layer], variables: Mapping[str, Any], replaced: Collection[str] = ()
) -> dict[str, np.ndarray]:
  """Returns what an inference needs besides codes and scales, `{path: array}`.

  Biases, norms, embeddings and other collections, without statistics of activations.
  Names of parameters are their paths, other names begin with that of the collection.

  Args:
    layers: of the network.
    variables: of the network.
    replaced: the parameters that are nothing but weights of products.
  """
  kernels = {*map(weights_name, layers), *replaced}
  others = {k: v for k, v in variables.items() if k not in ('params', QUANT_STATS)}
  flat = traverse_util.flatten_dict(variables['params'], sep='/')
  flat = {path: leaf for path, leaf in flat.items() if path not in kernels}
  flat |= traverse_util.flatten_dict(others, sep='/')
  return {path: np.asarray(leaf) for path, leaf in flat.items()}


def _join(*parts):
  return '/'.join(filter(None, parts))


def _quantized_layer(layer, kernel, statistics, formats, calibration, shared_scale):
  product, name = products.rebuilt(layer), formats['weights']
  stack = kernel.shape[: kernel.ndim - len(layer.kernel_shape)]
  elements = [
    _encode(jnp.asarray(element), name, product, of_weights(calibration))
    for element in kernel.reshape(-1, *layer.kernel_shape)
  ]
  values, weight_scale, block_scale = (
    None if part[0] is None else np.stack(part).reshape(*stack, *part[0].shape)
    for part in zip(*elements)
  )
  if block_scale is not None:
    block_scale = block_scale.astype(codes.scale_dtype(find_format(name).block.scale))
  activations, scale = formats['activations'], None
  if statistics is not None:
    one_for_all = shared_scale == 'tensor'
    # As in training, where nothing was seen yet.
    if one_for_all and not np.any(statistics.absmax > 0):
      activations = 'float32'
    seen = np.all(statistics.absmax > 0)
    if activations == 'float32' or (
      one_for_all and seen and not _has_blocks(activations)
    ):
      quantizer = calibrate(
        get_format(activations), *statistics, of_activations(calibration)
      )
      scale = np.asarray(quantizer.scale / unshift(activations, quantizer))
  return QuantizedLayer(
    layer=layer,
    weights=name,
    activations=activations,
    codes=values.astype(codes.dtype_of(name)),
    weight_scale=weight_scale,
    block_scale=block_scale,
    activation_scale=scale,
    statistics=statistics,
    calibration=calibration,
    shared_scale=shared_scale,
  )


def _has_blocks(name):
  return find_format(name).block is not None


def _encode(x, name, product, calibration):
  """Returns a tensor's values in a format, their scales and those of blocks, numpy."""
  statistics = tensor_statistics(x, product.contracted)
  if not _has_blocks(name):
    quantizer = calibrate(get_format(name), *statistics, calibration)
    factor = unshift(name, quantizer)
    parts = quantizer.codes(x) * factor, quantizer.scale / factor
    return *jax.device_get(parts), None
  axis = product.contraction.w_axis
  quantizer = calibrate_blocks(x, get_format(name), *statistics, calibration, axis)
  # One scale of the tensor, and a unit for each block.
  scale = quantizer.scale.ravel()[:1].reshape((1,) * x.ndim)
  blocks = jnp.squeeze(quantizer.blocks.of_units, axis)
  return jax.device_get((quantizer.codes(x), scale, blocks))


def unshift(name: str, quantizer: Quantizer) -> jax.Array:
  """Returns the power of two between a format's values and a quantizer's codes."""
  if find_format(name).family == 'unscaled':
    return jnp.float32(1)
  return get_format(name).max / jnp.asarray(quantizer.format.max)
