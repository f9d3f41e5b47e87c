"""Hardware costs: a cost model is one pure function of what each layer is and has.

Convention, which reproduces the costs that FLIQS publishes: every convolution and dense
layer counts, the stem, shortcuts and classifier included, each at its own formats;
attention products (unless they are searched), biases, normalisation and pooling do not.
A layer that is not quantized counts 16 bits. Sizes and times are those of a batch of
one example.

    @register('linear_compute', unit='Gbit·MACs')
    def linear_compute(layers):
      return layers.macs * maximum(layers.weight_bits, layers.activation_bits) / 1e9

What a model needs besides the layers are keyword arguments, which `get_cost_model`
binds. docs/costs.md lists the models.
"""

from collections.abc import Callable
import functools
import inspect
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from fliqs_jax.errors import ConfigError, not_among
from fliqs_jax.layers.layer import Layer
from fliqs_jax.search import devices, latency
from fliqs_jax.search.quantities import Array, LayerQuantities, layer_quantities
from fliqs_jax.search.space import SearchSpace, uniform_space


class CostModel(NamedTuple):
  """A hardware cost, from the costs of the layers."""

  name: str
  unit: str
  layer_costs: Callable[[LayerQuantities], Array]  # -> [..., L]
  combine: str = 'sum'  # how layers make up a network: sum, or max for a peak

  def per_layer(self, space: SearchSpace, choices: Array) -> Array:
    """Returns the cost of each layer, `[..., L]`, under choices `int32[..., N]`.

    Numpy choices are computed by numpy in float64, jax arrays by jax in float32.
    """
    return self.layer_costs(layer_quantities(space, choices))

  def __call__(self, space: SearchSpace, choices: Array) -> Array:
    """Returns the cost of the network, `[...]`."""
    return self.total(self.per_layer(space, choices))

  def total(self, layer_costs: Array) -> Array:
    """Returns the cost of a network, `[...]`, whose layers cost `[..., L]`."""
    return getattr(layer_costs, self.combine)(axis=-1)

  def uniform(self, layers: tuple[Layer, ...], name: str) -> float:
    """Returns the cost of the network with every layer in one format."""
    return float(self(uniform_space(layers, name), np.zeros(0, np.int32)))


COST_MODELS: dict[str, CostModel] = {}


def register(name: str, unit: str, combine: str = 'sum'):
  """Decorates `LayerQuantities -> [..., L]` to be found by `get_cost_model`.

  The function must use operators and functions that serve numpy and jax alike.
  """

  def decorate(layer_costs):
    COST_MODELS[name] = CostModel(name, unit, layer_costs, combine)
    return layer_costs

  return decorate


def get_cost_model(name: str, **settings: Any) -> CostModel:
  """Returns the cost model of that name.

  Args:
    name: one of `COST_MODELS`.
    **settings: of cost models, `device` and `table`; those that this one takes are
      bound, the others ignored.

  Raises:
    ConfigError: where there is none; the message names the nearest one.
  """
  if name not in COST_MODELS:
    raise ConfigError(not_among(f'unknown cost model {name!r}', name, COST_MODELS))
  model = COST_MODELS[name]
  taken = inspect.signature(model.layer_costs).parameters.keys() & settings.keys()
  if not taken:
    return model
  bound = functools.partial(
    model.layer_costs, **{setting: settings[setting] for setting in taken}
  )
  return model._replace(layer_costs=bound)


def maximum(a: Array, b: Array) -> Array:
  """Returns the larger of two numpy or (traced) jax arrays, elementwise."""
  return (np if isinstance(a, np.ndarray) else jnp).maximum(a, b)


@register('bops', unit='GBOPs')
def bops(layers: LayerQuantities) -> Array:
  """Bit operations, `MACs · bits_w · bits_a`, in 10⁹ (FLIQS, Section 3)."""
  return layers.macs * layers.weight_bits * layers.activation_bits / 1e9


@register('model_size', unit='bytes')
def model_size(layers: LayerQuantities) -> Array:
  """Bytes of the weights."""
  return layers.weights * layers.weight_bits / 8


@register('linear_compute', unit='Gbit·MACs')
def linear_compute(layers: LayerQuantities) -> Array:
  """Multiply-accumulates at the wider operand, `MACs · max(bits_w, bits_a)`, in 10⁹."""
  return layers.macs * maximum(layers.weight_bits, layers.activation_bits) / 1e9


@register('activation_bytes', unit='bytes')
def activation_bytes(layers: LayerQuantities) -> Array:
  """Bytes of the inputs of all layers."""
  inputs = layers.inputs * layers.activation_bits
  return layers.calls * (inputs + layers.second_inputs * layers.weight_bits) / 8


@register('peak_activation_bytes', unit='bytes', combine='max')
def peak_activation_bytes(layers: LayerQuantities) -> Array:
  """Bytes that one layer needs at once: its input and its output.

  The output counts at the width of the input, since what follows a layer is fused with
  it up to the next rounding. Tensors kept for a shortcut meanwhile are not counted.
  """
  elements = (layers.inputs + layers.outputs) * layers.activation_bits
  return (elements + layers.second_inputs * layers.weight_bits) / 8


@register('kv_cache', unit='bytes')
def kv_cache(layers: LayerQuantities) -> Array:
  """Bytes of the keys and values of one text, which a decoder keeps for its next token.

  They are the second inputs of the products inside attention, once for the heads that
  share them. Where these products are not searched, there are none.
  """
  return layers.calls * layers.second_inputs * layers.weight_bits / 8


@register('roofline', unit='ms')
def roofline(layers: LayerQuantities, device: str = devices.DEFAULT) -> Array:
  """Time on a device, `max(2 · MACs / peak rate, bytes / bandwidth)`, for one example.

  Bytes are those of the weights, the input and the output, each once, at the widths
  that the device has; the output is as wide as the input's format. Layers run one after
  the other (Williams et al., 2009, "Roofline").
  """
  accelerator = devices.get_device(device)
  tables = devices.format_tables(accelerator, layers.format_names)
  rates, bits = map(layers.asarray, (tables.rates / 1e12, tables.bits))
  second = layers.weights + layers.calls * layers.second_inputs
  weights = second * bits[layers.weight_formats]
  elements = layers.calls * (layers.inputs + layers.outputs)
  activations = elements * bits[layers.activation_formats]
  compute = layers.macs / rates[layers.weight_formats, layers.activation_formats]
  memory = (weights + activations) / 8 / (accelerator.bandwidth / 1e12)
  return maximum(2 * compute, memory) / 1e9  # from 10⁻¹² s


@register('latency_table', unit='ms')
def latency_table(layers: LayerQuantities, table: latency.LatencyTable) -> Array:
  """Measured time of one example; with two formats, that of the slower one."""
  times = layers.asarray(latency.layer_times(table, layers.layers, layers.format_names))
  return layers.calls * maximum(
    times[layers.layer_ids, layers.weight_formats],
    times[layers.layer_ids, layers.activation_formats],
  )
