"""The layers that a layer of a supernet can become, each as it would be discovered."""

import math
from typing import Any

from fliqs_jax.layers.architecture import Table, combine

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


def variants(layer: Any) -> Table:
  """Returns a layer of plain integers for every combination of what decides its sizes.

  Args:
    layer: a `discovery.Layer`; where nothing is decided it is its own variant.
  """
  if layer.sizes is None:
    return Table((), (layer,))
  result = combine(lambda *sizes: _resized(layer, *sizes), *layer.sizes)
  return result if isinstance(result, Table) else Table((), (result,))


def _resized(layer, inputs, outputs, kernel, present):
  """The layer with other sizes, None for those that it keeps."""
  if present == 0:
    return layer._replace(**_NOTHING)
  axes = layer.axes
  arguments = dict(layer.arguments)
  grouped = layer.kernel_shape[axes.w_inputs] != layer.input_shape[axes.x_inputs]
  input_shape, kernel_shape = list(layer.input_shape), list(layer.kernel_shape)
  output_shape = list(layer.output_shape)
  if inputs is not None:
    input_shape[axes.x_inputs] = inputs
    if grouped:
      arguments['feature_group_count'] = inputs
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
    sizes=None,
    axes=None,
    gate='',
  )
