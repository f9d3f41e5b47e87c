"""The layers that those of a supernet can become, each as it would be discovered."""

from collections.abc import Sequence
import dataclasses
import functools
import math

import jax
import numpy as np

from fliqs_jax.layers.architecture import Decision, Table, combine
from fliqs_jax.layers.layer import Layer

# What is left of a layer that is skipped: nothing of it is counted.
_NOTHING = {
  'input_shape': (0,),
  'kernel_shape': (0,),
  'output_shape': (0,),
  'macs': 0,
  'params': 0,
  'arguments': (),
  'sizes': None,
  'axes': None,
  'gate': '',
}


def architecture_decisions(layers: Sequence[Layer]) -> tuple[Decision, ...]:
  """Returns what decides the sizes of a network's layers, in network order."""
  return tuple(
    dict.fromkeys(
      decision
      for layer in layers
      for size in layer.sizes or ()
      if isinstance(size, Table)
      for decision in size.decisions
    )
  )


@dataclasses.dataclass(frozen=True, eq=False)
class Variants:
  """All layers that L layers can become, over the decisions of an architecture.

  Attributes:
    tables: of each of the L layers.
    decisions: the A decisions.
  """

  tables: tuple[Table, ...]
  decisions: tuple[Decision, ...]

  @functools.cached_property
  def layers(self) -> tuple[Layer, ...]:
    """All M layers, those that one of the L layers can become next to each other."""
    return tuple(layer for table in self.tables for layer in table.values)

  @functools.cached_property
  def _first(self):
    """int32[L], where those of each layer begin."""
    sizes = [len(table.values) for table in self.tables]
    return np.cumsum([0, *sizes[:-1]], dtype=np.int32)

  @functools.cached_property
  def _strides(self):
    """int32[A, L], by how many variants the options of a decision lie apart."""
    rows = [table.strides() for table in self.tables]
    names = [decision.name for decision in self.decisions]
    return np.array([[row.get(name, 0) for row in rows] for name in names], np.int32)

  def ids(self, choices: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
    """Returns which of `layers` each of the L layers is.

    Args:
      choices: int32[..., A], of the decisions; numpy in, numpy out.

    Returns:
      int32[..., L], or int32[L] where nothing is decided.
    """
    if not self.decisions:
      return self._first
    return self._first + choices @ self._strides

  def chosen(self, choices: np.ndarray) -> tuple[Layer, ...]:
    """Returns the layers of the network of choices int32[A], without skipped ones."""
    layers = (self.layers[i] for i in self.ids(np.asarray(choices)))
    return tuple(layer for layer in layers if any(layer.kernel_shape))


def find_variants(layers: Sequence[Layer]) -> Variants:
  """Returns all that layers can become."""
  return Variants(tuple(map(variants, layers)), architecture_decisions(layers))


def variants(layer: Layer) -> Table:
  """Returns a layer of plain integers for every combination of what decides its sizes.

  Where nothing is decided it is its own variant.
  """
  if layer.sizes is None:
    return Table((), (layer,))
  result = combine(lambda *sizes: _resized(layer, *sizes), *layer.sizes)
  return result if isinstance(result, Table) else Table((), (result,))


def _resized(layer, inputs, outputs, kernel, present):
  """The layer with other sizes, None for those that it keeps."""
  if present == 0:
    return layer._replace(**_NOTHING)
  axes, contraction = layer.axes, layer.contraction
  arguments = dict(layer.arguments)
  grouped = layer.kernel_shape[axes.w_inputs] != layer.input_shape[axes.x_inputs]
  input_shape, kernel_shape = list(layer.input_shape), list(layer.kernel_shape)
  output_shape = list(layer.output_shape)
  if inputs is not None:
    input_shape[axes.x_inputs] = inputs
    if grouped:
      arguments['feature_group_count'] = inputs
      contraction = contraction._replace(groups=inputs)
    else:
      kernel_shape[axes.w_inputs] = inputs
  if outputs is not None:
    kernel_shape[axes.w_outputs] = output_shape[axes.x_inputs] = outputs
  if kernel is not None:
    for axis in axes.w_space:
      kernel_shape[axis] = kernel
    arguments['padding'] = ((kernel // 2, kernel // 2),) * len(axes.w_space)
  elements, old_elements = math.prod(kernel_shape), math.prod(layer.kernel_shape)
  biases = kernel_shape[axes.w_outputs] if layer.params > old_elements else 0
  return layer._replace(
    input_shape=tuple(input_shape),
    kernel_shape=tuple(kernel_shape),
    output_shape=tuple(output_shape),
    macs=layer.calls
    * math.prod(output_shape)
    * elements
    // kernel_shape[axes.w_outputs],
    params=elements + biases,
    arguments=tuple(sorted(arguments.items())),
    contraction=contraction,
    sizes=None,
    axes=None,
    gate='',
  )
