"""Rules of sums, sorting and pooling: (graph, equation, names) -> name or names."""

import numpy as np

from fliqs_jax.errors import ConfigError
from fliqs_jax.exporting.onnx_graph.graph import unknown


def _reduce(operation):
  def convert(graph, equation, names):
    axes = graph.integers(equation.params['axes'])
    return graph.node(operation, [*names, axes], keepdims=0)

  return convert


def _reduce_truth(operation):
  """Truth values are reduced as numbers, since ONNX has no such operation."""
  reduce = _reduce(operation)

  def convert(graph, equation, names):
    numbers = [graph.cast(names[0], np.int32)]
    return graph.cast(reduce(graph, equation, numbers), bool)

  return convert


def _arg(operation):
  def convert(graph, equation, names):
    (axis,) = equation.params['axes']
    found = graph.node(operation, names, axis=axis, keepdims=0)
    return graph.cast(found, equation.params['index_dtype'])

  return convert


def _cumsum(graph, equation, names):
  axis = graph.constant(np.int64(equation.params['axis']))
  reverse = int(equation.params['reverse'])
  return graph.node('CumSum', [names[0], axis], reverse=reverse)


def _top_k(graph, equation, names):
  params = equation.params
  axis = params.get('axis', equation.invars[0].aval.ndim - 1)
  values, indices = _first(graph, names[0], params['k'], axis, largest=1)
  return [values, graph.cast(indices, equation.outvars[1].aval.dtype)]


def _sort(graph, equation, names):
  """Sorts the operands by the first, as `argsort` does."""
  params = equation.params
  axis = params['dimension']
  length = equation.invars[0].aval.shape[axis]
  if params['num_keys'] != 1 or unknown(length):
    raise ConfigError('the network sorts by several keys, which ONNX export cannot')
  values, indices = _first(graph, names[0], length, axis, largest=0)
  taken = [graph.node('GatherElements', [n, indices], axis=axis) for n in names[1:]]
  return [values, *taken]


def _first(graph, name, count, axis, largest):
  # Of equal ones the earlier comes first, as in JAX.
  inputs = [name, graph.integers([count])]
  return graph.nodes_outputs('TopK', inputs, 2, axis=axis, largest=largest)


def _pool(operation):
  def convert(graph, equation, names):
    params, rank = equation.params, equation.invars[0].aval.ndim
    window, strides = params['window_dimensions'], params['window_strides']
    space = [axis for axis in range(rank) if window[axis] != 1 or strides[axis] != 1]
    if any(d != 1 for d in params['base_dilation']) or len(space) + 2 > rank:
      raise ConfigError('the network pools over batch or channels: no ONNX rule')
    order = [axis for axis in range(rank) if axis not in space]
    # Whatever is not pooled over is the batch and the channels.
    while len(order) > 2:
      space.insert(0, order.pop(1))
    space.sort()
    order += space
    padding = [params['padding'][axis] for axis in space]
    attributes = {'count_include_pad': 1} if operation == 'AveragePool' else {}
    y = graph.node(
      operation,
      [graph.transposed(names[0], order)],
      kernel_shape=[window[axis] for axis in space],
      strides=[strides[axis] for axis in space],
      dilations=[params['window_dilation'][axis] for axis in space],
      pads=[low for low, _ in padding] + [high for _, high in padding],
      **attributes,
    )
    if operation == 'AveragePool':  # of which the sum is wanted
      y = graph.node('Mul', [y, graph.constant(np.float32(np.prod(window)))])
    return graph.transposed(y, np.argsort(order))

  return convert


RULES = {
  'argmax': _arg('ArgMax'),
  'argmin': _arg('ArgMin'),
  'cumsum': _cumsum,
  'reduce_and': _reduce_truth('ReduceMin'),
  'reduce_max': _reduce('ReduceMax'),
  'reduce_min': _reduce('ReduceMin'),
  'reduce_or': _reduce_truth('ReduceMax'),
  'reduce_prod': _reduce('ReduceProd'),
  'reduce_sum': _reduce('ReduceSum'),
  'reduce_window_max': _pool('MaxPool'),
  'reduce_window_sum': _pool('AveragePool'),
  'sort': _sort,
  'top_k': _top_k,
}
