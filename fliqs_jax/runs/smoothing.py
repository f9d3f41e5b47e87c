"""Smoothing: channels are scaled where they arise, and back where a layer reads them.

A layer rounds all its inputs with one scale, so that a few large channels leave little
of the others. Channels that a norm or another layer scales can be divided by `s`, and
the weights that read them multiplied by it: in floating point the network stays the
same (SmoothQuant, Xiao et al., 2022, arXiv 2211.10438, Equation 4),

    s_c = max|x_c|^α / max|w_c|^(1 − α)

What can be scaled so is not looked up by name but tried: the channels of a norm or a
layer are divided by numbers that all differ, and the layers of which each input changed
by one of these are those that read them. They count only where the outputs, and the
inputs of all other layers, are as before once their weights make up for it.
"""

from collections.abc import Callable, Mapping
import logging
from typing import Any, NamedTuple

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from fliqs_jax.errors import ConfigError
from fliqs_jax.layers import channels, moments, products
from fliqs_jax.numerics.products import Product
from fliqs_jax.search.space import SearchSpace

_logger = logging.getLogger(__name__)

_KERNEL, _BIAS, _SCALE = 'kernel', 'bias', 'scale'  # parameters of Flax's layers
_LARGEST = 2.0  # of the numbers that are tried; the smallest is its inverse
_SAME_RATIO = 1e-4  # at most, between logarithms of ratios, in float32
_TOLERANCE = 1e-3  # of what is to be as before, relative to its largest magnitude

Params = Mapping[str, Any]  # by path, as `blocks/0/norm/scale`
Products = Mapping[str, Product]  # of layers, by path
# Parameters -> the network's outputs, and the magnitudes of inputs, {path: float32[n]}
Look = Callable[[Any], tuple[Any, Mapping[str, np.ndarray]]]


class Pair(NamedTuple):
  """A norm or a layer whose channels can be scaled, and the layers that read them."""

  producer: str  # path of its module
  readers: Mapping[str, np.ndarray]  # path -> the channel that each input is, int[n]


def smooth(
  space: SearchSpace,
  params: Any,
  look: Look,
  magnitudes: Mapping[str, np.ndarray],
  strength: float,
) -> tuple[Any, list[Pair]]:
  """Returns the parameters of the same function with smoother inputs of layers.

  Args:
    space: with the layers.
    params: of the network, nested.
    look: what is to stay as it is, on few examples.
    magnitudes: of the inputs of layers, on all examples, `{path: float32[n]}`.
    strength: α, between 0 and 1.

  Returns:
    the parameters, and what was scaled.

  Raises:
    ConfigError: where no layer has inputs that can be scaled.
  """
  flat = traverse_util.flatten_dict(params, sep='/')
  known = _products(space, flat)
  pairs = _pairs(flat, known, look)
  if not pairs:
    raise ConfigError(
      f'search.smoothing={strength}: no channels of a norm or a layer reach only '
      'layers that are searched, scaled alike in float32; expected '
      'search.smoothing=None'
    )
  for pair in pairs:
    factors = _factors(flat, known, pair, magnitudes, strength)
    flat = _scaled(flat, known, pair, factors)
    _logger.info('Smoothed: %s for %s.', pair.producer, ', '.join(pair.readers))
  return _nested(flat), pairs


def _products(space, params) -> Products:
  """Returns the products of the layers whose kernels are parameters of their own."""
  return {
    layer.path: product
    for layer in space.layers
    if np.shape(params.get(_leaf(layer.path, _KERNEL))) == layer.kernel_shape
    and moments.is_covered(product := products.rebuilt(layer))
  }


def _pairs(params, known, look):
  """Returns all pairs, each layer the reader of at most one."""
  outputs, inputs = look(_nested(params))
  pairs, taken = [], set()
  for producer, count in _producers(params, known).items():
    factors = _numbers(count)
    changed = look(_nested(_divided(params, known, producer, factors)))[1]
    readers = {
      path: found
      for path in inputs
      if path in known and path not in taken
      if (found := _channels(inputs[path], changed[path], factors)) is not None
    }
    if not readers:
      continue
    pair = Pair(producer, readers)
    outputs_now, inputs_now = look(_nested(_scaled(params, known, pair, factors)))
    others = [path for path in inputs if path not in readers]
    same = [_alike(inputs[path], inputs_now[path]) for path in others]
    if all(same + jax.tree.leaves(jax.tree.map(_alike, outputs, outputs_now))):
      pairs.append(pair)
      taken |= set(readers)
  return pairs


def _producers(params, known):
  """Returns the number of channels of each norm and each layer, by path."""
  norms = {
    path.rpartition('/')[0]: len(leaf)
    for path, leaf in params.items()
    if path.rpartition('/')[2] == _SCALE and np.ndim(leaf) == 1
  }
  layers = {
    path: moments.as_matrix(product, params[_leaf(path, _KERNEL)])[0].shape[1]
    for path, product in known.items()
  }
  return {path: count for path, count in (norms | layers).items() if count > 1}


def _numbers(count):
  """Returns numbers that all differ, in no order, float32[count]."""
  places = np.random.default_rng(0).permutation(count)
  return (_LARGEST ** (2 * places / (count - 1) - 1)).astype(np.float32)


def _channels(before, after, numbers):
  """Returns the channel that each input of a layer is, int[n]; None where some are not.

  Inputs that are 0 on all examples say nothing: they are taken for the channels of
  their own places where all others are.
  """
  if len(before) % len(numbers):
    return None
  alive = (before > 0) & (after > 0)
  ratios = np.log(np.where(alive, before, 1.0) / np.where(alive, after, 1.0))
  order, largest = np.argsort(numbers), np.log(_LARGEST)
  step = 2 * largest / (len(numbers) - 1)
  places = np.round((ratios + largest) / step).clip(0, len(numbers) - 1).astype(int)
  found = order[places]
  distances = np.abs(ratios - np.log(numbers[found]))
  if not alive.any() or np.any(alive & (distances > min(_SAME_RATIO, step / 4))):
    return None
  if alive.all():
    return found
  own = np.arange(len(before))
  in_place = len(before) == len(numbers) and np.array_equal(found[alive], own[alive])
  return own if in_place else None


def _divided(params, known, producer, factors):
  """Returns the parameters with the channels of a producer divided by factors."""
  changed, inverse = dict(params), jnp.asarray(1 / factors, jnp.float32)
  if producer in known:
    leaf = _leaf(producer, _KERNEL)
    changed[leaf] = channels.with_outputs_scaled(known[producer], params[leaf], inverse)
  else:
    changed[_leaf(producer, _SCALE)] = params[_leaf(producer, _SCALE)] * inverse
  if (bias := _leaf(producer, _BIAS)) in params:
    changed[bias] = params[bias] * inverse.reshape(np.shape(params[bias]))
  return changed


def _scaled(params, known, pair, factors):
  """Returns the parameters after a pair is scaled by factors, float32[c]."""
  changed = _divided(params, known, pair.producer, factors)
  for path, found in pair.readers.items():
    leaf = _leaf(path, _KERNEL)
    changed[leaf] = channels.with_inputs_scaled(
      known[path], changed[leaf], jnp.asarray(factors[found])
    )
  return changed


def _factors(params, known, pair, magnitudes, strength):
  """Returns what the channels of a pair are divided by, float32[c]."""
  count = _producers(params, known)[pair.producer]
  inputs, weights = np.zeros(count), np.zeros(count)
  for path, found in pair.readers.items():
    own = channels.weight_magnitudes(
      known[path], params[_leaf(path, _KERNEL)], len(found)
    )
    np.maximum.at(inputs, found, magnitudes[path])
    np.maximum.at(weights, found, np.asarray(own))
  alive = (inputs > 0) & (weights > 0)
  logs = strength * np.log(np.where(alive, inputs, 1.0)) - (1 - strength) * np.log(
    np.where(alive, weights, 1.0)
  )
  # Their mean is that of no change, and so is a channel that is always 0.
  mean = logs[alive].mean() if alive.any() else 0.0
  return np.exp(np.where(alive, logs - mean, 0.0)).astype(np.float32)


def _alike(before, after):
  before, after = np.asarray(before, np.float64), np.asarray(after, np.float64)
  largest = np.max(np.abs(before), initial=0.0)
  return bool(np.all(np.abs(after - before) <= _TOLERANCE * largest))


def _nested(params):
  return traverse_util.unflatten_dict(params, sep='/')


def _leaf(path, name):
  return f'{path}/{name}'.lstrip('/')
