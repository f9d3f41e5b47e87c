"""Quantities of layers that costs depend on, under given choices."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fliqs_jax.layers.layer import PAIR, Layer
from fliqs_jax.layers.variants import Variants
from fliqs_jax.numerics import formats
from fliqs_jax.search.space import SearchSpace

UNQUANTIZED_BITS = 16

Array = jax.Array | np.ndarray


class LayerQuantities(NamedTuple):
  """Arrays over the L layers of a network, of all that a cost can depend on.

  Where the architecture is searched, sizes have the axes of the choices in front; a
  layer that is skipped has sizes of 0.
  """

  macs: Array  # [..., L] multiply-accumulates for one example
  weights: Array  # [..., L] elements of the kernel, or kernels
  inputs: Array  # [..., L] elements of the input of one example in one call
  outputs: Array  # [..., L] elements of the output of one example in one call
  calls: Array  # [..., L] calls of the layer in one forward pass
  # [..., L] elements of a second input, in the format of the weights, of a product of
  # two activations; 0 of any other layer
  second_inputs: Array
  weight_bits: Array  # [..., L] bits of one weight
  activation_bits: Array  # [..., L] bits of one input activation
  weight_formats: Array  # int32[..., L] index in `format_names`
  activation_formats: Array  # int32[..., L] index in `format_names`
  format_names: tuple[str, ...]
  layer_ids: Array  # int32[..., L] index in `layers`
  layers: tuple[Layer, ...]  # all that the L layers can become

  def asarray(self, values: np.ndarray) -> Array:
    """Returns constants as the other fields are: numpy float64, or jax float32."""
    return _asarray(values, like=self.weight_formats)


def layer_quantities(space: SearchSpace, choices: Array) -> LayerQuantities:
  """Returns the quantities of every layer under choices `int32[..., N]`.

  In float64 for numpy choices, in float32 for (traced) jax arrays.
  """
  asarray = functools.partial(_asarray, like=choices)
  bits = asarray(list(map(counted_bits, space.format_names)))
  ids = space.format_ids(choices)
  if isinstance(choices, np.ndarray):
    # In one memory order, so that sums round alike for one row of choices and many.
    ids = type(ids)(*map(np.ascontiguousarray, ids))
  layer_ids = space.variants.ids(space.architecture_choices(choices))
  return LayerQuantities(
    *(asarray(sizes)[layer_ids] for sizes in _sizes(space.variants)),
    weight_bits=bits[ids.weights],
    activation_bits=bits[ids.activations],
    weight_formats=ids.weights,
    activation_formats=ids.activations,
    format_names=space.format_names,
    layer_ids=layer_ids,
    layers=space.variants.layers,
  )


def counted_bits(name: str) -> float:
  """Returns the bits of a format as costs count them: no more than an unquantized.

  Those of a block format are a fraction, with each value's share of its block's scale.
  """
  return min(formats.find_format(name).bits_per_value, UNQUANTIZED_BITS)


@functools.lru_cache(maxsize=64)  # by identity: a cost model is called many times
def _sizes(variants: Variants) -> np.ndarray:
  """float64[6, M], the first six fields of `LayerQuantities` of each variant."""
  rows = [
    (
      layer.macs,
      layer.kernels * math.prod(layer.kernel_shape),
      math.prod(layer.input_shape),
      math.prod(layer.output_shape),
      layer.calls,
      math.prod(layer.kernel_shape) if layer.kind == PAIR else 0,
    )
    for layer in variants.layers
  ]
  return np.array(rows, np.float64).reshape(-1, 6).T.copy()


def _asarray(values, like):
  if isinstance(like, np.ndarray):
    return np.asarray(values, np.float64)
  return jnp.asarray(values, jnp.float32)
