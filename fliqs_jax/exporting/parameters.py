"""What a searched network deploys: codes and scales of each layer, and the rest."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from fliqs_jax.errors import ConfigError
from fliqs_jax.exporting import codes
from fliqs_jax.layers import products
from fliqs_jax.layers.layer import Layer
from fliqs_jax.layers.variables import QUANT_STATS
from fliqs_jax.numerics.calibration import (
  Statistics,
  calibrate,
  of_activations,
  of_weights,
  tensor_statistics,
)
from fliqs_jax.numerics.formats import find_format, get_format
from fliqs_jax.search.assignments import Assignment

KERNEL = 'kernel'  # the parameter of Flax's layers that is quantized


class QuantizedLayer(NamedTuple):
  """Codes and scales of one layer: `codes · weight_scale` are its weights.

  Attributes:
    layer: its shapes and arguments.
    weights: the name of the format of the weights.
    activations: that of its input; `float32` where nothing is known of the input.
    codes: values of the format in the narrowest type that holds them, of the kernel's
      shape.
    weight_scale: float32, one for each output channel, broadcastable to the codes.
    activation_scale: float32[], 1 for formats that are not scaled; None where the
      input at hand sets it.
    statistics: of the input, float32[] each; None where none are kept.
  """

  layer: Layer
  weights: str
  activations: str
  codes: np.ndarray
  weight_scale: np.ndarray
  activation_scale: np.ndarray | None
  statistics: Statistics | None

  def decoded(self) -> np.ndarray:
    """Returns the weights, float32."""
    return self.codes.astype(np.float32) * self.weight_scale


def quantized_parameters(
  layers: Sequence[Layer],
  variables: Mapping[str, Any],
  formats: Assignment,
  calibration: str = 'rms',
) -> dict[str, QuantizedLayer]:
  """Returns codes and scales of every layer, `{path: QuantizedLayer}`.

  Args:
    layers: of the network, from `discover`.
    variables: `params`, and `quant_stats` with statistics of the layers' inputs.
    formats: `{path: {'weights': name, 'activations': name}}`.
    calibration: one of `calibration.LAYER_CALIBRATIONS`, that of the search.

  Raises:
    ConfigError: where a layer's weights are not one parameter, or it has a block
      format; one line for each.
  """
  params = traverse_util.flatten_dict(variables['params'], sep='/')
  statistics = traverse_util.flatten_dict(variables.get(QUANT_STATS, {}), sep='/')
  quantized, problems = {}, []
  for layer in layers:
    kernel = params.get(_join(layer.path, KERNEL))
    if kernel is None or np.shape(kernel) != layer.kernel_shape:
      found = 'none' if kernel is None else str(np.shape(kernel))
      problems.append(
        f'layer {layer.path!r} multiplies by weights {layer.kernel_shape} that are not '
        f'its parameter {KERNEL!r} ({found}): expected one, not made from several'
      )
      continue
    blocked = [name for name in formats[layer.path].values() if _has_blocks(name)]
    if blocked:
      problems.append(
        f'layer {layer.path!r} has the block format {blocked[0]}: expected a format '
        'with one scale for each channel, since blocks cannot be exported'
      )
      continue
    operator = _join(layer.path, layer.operator)
    kept = [statistics.get(f'{operator}/{name}') for name in Statistics._fields]
    quantized[layer.path] = _quantized_layer(
      layer,
      kernel,
      None if None in kept else Statistics(*map(np.asarray, kept)),
      formats[layer.path],
      calibration,
    )
  if problems:
    raise ConfigError(*problems)
  return quantized


def unquantized(
  layers: Sequence[Layer], variables: Mapping[str, Any]
) -> dict[str, np.ndarray]:
  """Returns what an inference needs besides codes and scales, `{path: array}`.

  Biases, norms, embeddings and other collections, without statistics of activations.
  Names of parameters are their paths, other names begin with that of the collection.
  """
  kernels = {_join(layer.path, KERNEL) for layer in layers}
  others = {k: v for k, v in variables.items() if k not in ('params', QUANT_STATS)}
  flat = traverse_util.flatten_dict(variables['params'], sep='/')
  flat = {path: leaf for path, leaf in flat.items() if path not in kernels}
  flat |= traverse_util.flatten_dict(others, sep='/')
  return {path: np.asarray(leaf) for path, leaf in flat.items()}


def _has_blocks(name):
  return find_format(name).block is not None


def _join(*parts):
  return '/'.join(filter(None, parts))


def _quantized_layer(layer, kernel, statistics, formats, calibration):
  contracted = products.rebuilt(layer).contracted
  values, weight_scale = _encode(
    jnp.asarray(kernel),
    formats['weights'],
    tensor_statistics(kernel, contracted),
    of_weights(calibration),
  )
  activations, scale = formats['activations'], None
  if statistics is not None:
    if not statistics.absmax > 0:  # as in training, where nothing was seen yet
      activations = 'float32'
    quantizer = calibrate(
      get_format(activations), *statistics, of_activations(calibration)
    )
    scale = np.asarray(quantizer.scale / _unshift(activations, quantizer))
  return QuantizedLayer(
    layer=layer,
    weights=formats['weights'],
    activations=activations,
    codes=values.astype(codes.dtype_of(formats['weights'])),
    weight_scale=weight_scale,
    activation_scale=scale,
    statistics=statistics,
  )


def _encode(x, name, statistics, calibration):
  """Returns a tensor's values in a format, and their scales, in numpy."""
  quantizer = calibrate(get_format(name), *statistics, calibration)
  factor = _unshift(name, quantizer)
  return jax.device_get((quantizer.codes(x) * factor, quantizer.scale / factor))


def _unshift(name, quantizer):
  """Returns the power of two between a format's values and a quantizer's codes."""
  if find_format(name).family == 'unscaled':
    return jnp.float32(1)
  return get_format(name).max / jnp.asarray(quantizer.format.max)
