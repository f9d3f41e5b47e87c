"""Weights rounded by reconstruction in every format, for a search without training."""

from collections.abc import Mapping, Sequence
import logging

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from fliqs_jax.layers import moments as moments_lib
from fliqs_jax.layers import products
from fliqs_jax.layers.layer import Layer
from fliqs_jax.numerics.formats import find_format
from fliqs_jax.numerics.reconstruction import inverse_factor, reconstruct
from fliqs_jax.search import options
from fliqs_jax.search.space import SearchSpace
from fliqs_jax.training.train_state import TrainState

_KERNEL = 'kernel'  # the parameter of Flax's layers that is rounded
_logger = logging.getLogger(__name__)

Rounded = dict[str, dict[str, jax.Array]]  # {path: {format: kernel}}


def round_kernels(
  space: SearchSpace, state: TrainState, moments: Mapping[str, np.ndarray]
) -> Rounded:
  """Returns the kernels of a network's layers, rounded to each format they may have.

  Others stay as they are and are rounded to nearest: those whose weights are no
  parameter of their own or whose inputs have no moments, and those in block formats.

  Args:
    space: with the layers, and the formats that each of them may have.
    state: with the parameters.
    moments: of the inputs of layers, by path, float32[n, n].
  """
  params, rounded = traverse_util.flatten_dict(state.params, sep='/'), {}
  for layer, weights in zip(space.layers, space.weights):
    kernel = params.get(_path(layer))
    names = _rounded_formats(space, weights)
    if layer.path not in moments or np.shape(kernel) != layer.kernel_shape:
      _logger.info('Weights of %s are rounded to nearest.', layer.path or '.')
      continue
    rounded[layer.path] = _round(layer, kernel, moments[layer.path], names)
  return rounded


def with_rounded(
  state: TrainState, space: SearchSpace, rounded: Rounded, choices: np.ndarray
) -> TrainState:
  """Returns the state whose kernels are those rounded to the formats of choices."""
  if not rounded:
    return state
  params = traverse_util.flatten_dict(state.params, sep='/')
  formats = space.formats_of(choices)
  for layer in space.layers:
    kernels, name = rounded.get(layer.path, {}), formats[layer.path]['weights']
    if name in kernels:
      params[_path(layer)] = kernels[name]
  return state.replace(params=traverse_util.unflatten_dict(params, sep='/'))


def _path(layer):
  return f'{layer.path}/{_KERNEL}'.lstrip('/')


def _rounded_formats(space, weights) -> Sequence[str]:
  """Returns the formats of a layer's weights that round them, without blocks."""
  given = (
    (weights,) if isinstance(weights, str) else space.format_decisions[weights].options
  )
  # Several pairs may have the same format of weights.
  formats = map(find_format, dict.fromkeys(options.split(o).weights for o in given))
  return [f.name for f in formats if f.family != 'unscaled' and f.block is None]


def _round(layer: Layer, kernel, moments, names):
  product = products.rebuilt(layer)
  matrix, restore = moments_lib.as_matrix(product, kernel)
  moments = jnp.asarray(moments)
  factor = inverse_factor(moments)
  return {
    name: jax.device_put(
      restore(reconstruct(matrix, find_format(name).row, moments, factor)),
      kernel.sharding,
    )
    for name in names
  }
