"""Rules of what changes shapes and order: (graph, equation, names) -> name or names."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from fliqs_jax.errors import ConfigError
from fliqs_jax.exporting.onnx_graph.graph import Graph, unknown


def _reshape(graph, equation, names):
  return graph.reshaped(names[0], equation.outvars[0].aval.shape)


def _transpose(graph, equation, names):
  return graph.transposed(names[0], equation.params['permutation'])


def _concatenate(graph, equation, names):
  return graph.node('Concat', names, axis=equation.params['dimension'])


def _stack(graph, equation, names):
  axis, shape = equation.params['axis'], list(equation.invars[0].aval.shape)
  shape.insert(axis, 1)
  parts = [graph.reshaped(name, shape) for name in names]
  return graph.node('Concat', parts, axis=axis)


def _unstack(graph, equation, names):
  axis, count = equation.params['axis'], len(equation.outvars)
  parts = graph.nodes_outputs('Split', names, count, axis=axis, num_outputs=count)
  return [graph.reshaped(part, equation.outvars[0].aval.shape) for part in parts]


def _tile(graph, equation, names):
  return graph.node('Tile', [names[0], graph.integers(equation.params['reps'])])


def _unchanged(graph, equation, names):
  return names


def _slice(graph, equation, names):
  params, shape = equation.params, equation.invars[0].aval.shape
  strides = params['strides'] or (1,) * len(shape)
  cut = [
    (axis, first, last, stride)
    for axis, (first, last, stride) in enumerate(
      zip(params['start_indices'], params['limit_indices'], strides)
    )
    if not unknown(last)
  ]
  axes, starts, ends, steps = (graph.integers(column) for column in zip(*cut))
  return graph.node('Slice', [names[0], starts, ends, axes, steps])


def _split(graph, equation, names):
  sizes, axis = graph.integers(equation.params['sizes']), equation.params['axis']
  count = len(equation.outvars)
  return graph.nodes_outputs('Split', [names[0], sizes], count, axis=axis)


def _pad(graph, equation, names):
  config, (x, value) = equation.params['padding_config'], names
  shape = list(equation.invars[0].aval.shape)
  for axis, (*_, interior) in enumerate(config):
    if interior:
      x = spread(graph, x, shape, axis, interior + 1, value)
      shape[axis] = (shape[axis] - 1) * (interior + 1) + 1
  pairs = [(low, high) for low, high, _ in config]
  x = cropped(graph, x, pairs)
  pads = [max(low, 0) for low, _ in pairs] + [max(high, 0) for _, high in pairs]
  return graph.node('Pad', [x, graph.integers(pads), value]) if any(pads) else x


def cropped(graph: Graph, name: str, pairs: Sequence[tuple[int, int]]) -> str:
  """Returns a tensor without what negative padding takes away.

  Args:
    graph: grows.
    name: of the tensor.
    pairs: padding of each axis, before and after.
  """
  for axis, (low, high) in enumerate(pairs):
    if min(low, high) < 0:
      last = min(high, 0) or np.iinfo(np.int64).max
      name = graph.sliced(name, axis, max(-low, 0), last)
  return name


def spread(
  graph: Graph, name: str, shape: Sequence[Any], axis: int, step: int, value: str
) -> str:
  """Returns a tensor whose elements along an axis have others between them.

  Args:
    graph: grows.
    name: of the tensor.
    shape: of the tensor.
    axis: along which.
    step: from one element to the next.
    value: the name of the others' value, a scalar.
  """
  if unknown(shape[axis]):
    raise ConfigError('the network pads between examples, which ONNX export cannot')
  lengths = list(shape)
  lengths.insert(axis + 1, 1)
  pads = [0] * (2 * len(lengths))
  pads[len(lengths) + axis + 1] = step - 1
  x = graph.node('Pad', [graph.reshaped(name, lengths), graph.integers(pads), value])
  x = graph.reshaped(x, [*shape[:axis], shape[axis] * step, *shape[axis + 1 :]])
  return graph.sliced(x, axis, 0, (shape[axis] - 1) * step + 1)


def _rev(graph, equation, names):
  name = names[0]
  for axis in equation.params['dimensions']:
    name = graph.sliced(name, axis, -1, np.iinfo(np.int64).min, -1)
  return name


def _dynamic_slice(graph, equation, names):
  x, *starts = names
  shape, sizes = equation.invars[0].aval.shape, equation.params['slice_sizes']
  for axis, (start, length, size) in enumerate(zip(starts, shape, sizes)):
    if size != length:
      if unknown(length):
        raise ConfigError('the network picks examples of the batch: no ONNX rule')
      last = graph.integers([length - size])
      first = graph.reshaped(graph.cast(start, np.int64), [1])
      first = graph.node('Min', [graph.node('Max', [first, graph.integers([0])]), last])
      end = graph.node('Add', [first, graph.integers([size])])
      x = graph.node('Slice', [x, first, end, graph.integers([axis])])
  return x


RULES = {
  'concatenate': _concatenate,
  'dynamic_slice': _dynamic_slice,
  'name': _unchanged,
  'optimization_barrier': _unchanged,
  'pad': _pad,
  'reshape': _reshape,
  'rev': _rev,
  'slice': _slice,
  'split': _split,
  'squeeze': _reshape,
  'stack': _stack,
  'tile': _tile,
  'transpose': _transpose,
  'unstack': _unstack,
}
