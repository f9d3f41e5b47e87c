"""Hardware costs: a cost model is one pure function of what each layer is and has.

Convention, which reproduces the costs that FLIQS publishes: every convolution and dense
layer counts, the stem, shortcuts and classifier included, each at its own formats;
attention products, biases, normalisation and pooling do not. A layer that is not
quantized counts 16 bits.

    @register('linear_compute', unit='Gbit·MACs')
    def linear_compute(layers):
      return layers.macs * np.maximum(layers.weight_bits, layers.activation_bits) / 1e9
"""

from collections.abc import Callable
import difflib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fliqs_jax import formats as formats_lib
from fliqs_jax.search_space import Layer, SearchSpace, uniform_space

UNQUANTIZED_BITS = 16

Array = jax.Array | np.ndarray


class LayerQuantities(NamedTuple):
  """What a cost can depend on, in arrays over the L layers of a network."""

  macs: Array  # [L] multiply-accumulates for one example
  weights: Array  # [L] elements of the kernel
  weight_bits: Array  # [..., L] bits of one weight
  activation_bits: Array  # [..., L] bits of one input activation


class CostModel(NamedTuple):
  """A hardware cost, the sum of the costs of the layers."""

  name: str
  unit: str
  layer_costs: Callable[[LayerQuantities], Array]  # -> [..., L]

  def per_layer(self, space: SearchSpace, choices: Array) -> Array:
    """Returns the cost of each layer, `[..., L]`, under choices `int32[..., N]`.

    Numpy choices are computed by numpy in float64, jax arrays by jax in float32.
    """
    return self.layer_costs(layer_quantities(space, choices))

  def __call__(self, space: SearchSpace, choices: Array) -> Array:
    """Returns the cost of the network, `[...]`."""
    return self.per_layer(space, choices).sum(axis=-1)

  def uniform(self, layers: tuple[Layer, ...], name: str) -> float:
    """Returns the cost of the network with every layer in one format."""
    return float(self(uniform_space(layers, name), np.zeros(0, np.int32)))


COST_MODELS: dict[str, CostModel] = {}


def register(name: str, unit: str):
  """Decorates `LayerQuantities -> [..., L]` to be found by `get_cost_model`.

  The function must use operators and functions that serve numpy and jax alike.
  """

  def decorate(layer_costs):
    COST_MODELS[name] = CostModel(name, unit, layer_costs)
    return layer_costs

  return decorate


def get_cost_model(name: str) -> CostModel:
  """Returns the cost model of that name.

  Raises:
    ValueError: where there is none; the message names the nearest one.
  """
  if name not in COST_MODELS:
    nearest = difflib.get_close_matches(name, COST_MODELS, n=1, cutoff=0.0)
    raise ValueError(
      f'unknown cost model {name!r}: expected one of {", ".join(COST_MODELS)}; '
      f'the nearest is {nearest[0]!r}'
    )
  return COST_MODELS[name]


@register('bops', unit='GBOPs')
def bops(layers: LayerQuantities) -> Array:
  """Bit operations, `MACs · bits_w · bits_a`, in 10⁹ (FLIQS, Section 3)."""
  return layers.macs * layers.weight_bits * layers.activation_bits / 1e9


@register('model_size', unit='bytes')
def model_size(layers: LayerQuantities) -> Array:
  """Bytes of the weights."""
  return layers.weights * layers.weight_bits / 8


def layer_quantities(space: SearchSpace, choices: Array) -> LayerQuantities:
  """Returns the quantities of every layer under choices `int32[..., N]`.

  In float64 for numpy choices, in float32 for (traced) jax arrays.
  """
  if isinstance(choices, np.ndarray):
    asarray = lambda values: np.asarray(values, np.float64)
  else:
    asarray = lambda values: jnp.asarray(values, jnp.float32)
  stored_bits = formats_lib.stack(space.format_names).bits
  bits = asarray(np.minimum(stored_bits, UNQUANTIZED_BITS))
  ids = space.format_ids(choices)
  return LayerQuantities(
    macs=asarray([layer.macs for layer in space.layers]),
    weights=asarray([np.prod(layer.kernel_shape) for layer in space.layers]),
    weight_bits=bits[ids.weights],
    activation_bits=bits[ids.activations],
  )
