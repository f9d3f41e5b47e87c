"""Rules of gathering and scattering: (graph, equation, names) -> name.

JAX leaves out, fills in or clips an index that is out of bounds, ONNX Runtime refuses
it.
"""

import math

from jax import lax
import numpy as np

from fliqs_jax.errors import ConfigError
from fliqs_jax.exporting.onnx_graph.graph import Tensor, unknown

_DROPS = lax.GatherScatterMode.FILL_OR_DROP


def _gather(graph, equation, names):
  """Windows that begin at the indices along some axes, with all of the other axes."""
  numbers, params = equation.params['dimension_numbers'], equation.params
  x, indices = (atom.aval for atom in equation.invars)
  indexed, sizes = numbers.start_index_map, params['slice_sizes']
  if any(
    sizes[a] != x.shape[a]
    for a in range(x.ndim)
    if a not in (*indexed, *numbers.operand_batching_dims)
  ):
    raise ConfigError('the network gathers parts of an axis without an index: no rule')
  last = [x.shape[a] - sizes[a] for a in indexed]
  starts, inside = _within(graph, names[1], last)
  if indices.ndim == 1:
    ends = graph.node('Add', [starts, graph.integers([sizes[a] for a in indexed])])
    taken = graph.node('Slice', [names[0], starts, ends, graph.integers(indexed)])
    taken = graph.reshaped(taken, equation.outvars[0].aval.shape)
  else:
    taken = _looked_up(graph, equation, names[0], starts)
  if params['mode'] is not _DROPS or params['fill_value'] is None:
    return taken
  result, kept = equation.outvars[0].aval, numbers.offset_dims
  shape = [1 if a in kept else length for a, length in enumerate(result.shape)]
  value = graph.constant(np.asarray(params['fill_value'], result.dtype))
  return graph.node('Where', [graph.reshaped(inside, shape), taken, value])


def _looked_up(graph, equation, table, starts):
  """Returns what several lookups give, from where their windows begin."""
  numbers, sizes = equation.params['dimension_numbers'], equation.params['slice_sizes']
  x, indices = (atom.aval for atom in equation.invars)
  indexed, batched = numbers.start_index_map, numbers.operand_batching_dims
  rest = [a for a in range(x.ndim) if a not in (*indexed, *batched)]
  leading = [*numbers.start_indices_batching_dims]
  leading += [a for a in range(indices.ndim - 1) if a not in leading]
  if indexed == numbers.collapsed_slice_dims and len(indexed) == 1 and not batched:
    # What ONNX Runtime does fastest, and embeddings take.
    at = graph.reshaped(starts, indices.shape[:-1])
    taken = graph.node('Gather', [table, at], axis=indexed[0])
    axes = [a for a in rest if a < indexed[0]]
    axes = [*axes, *(('lookup', a) for a in leading), *rest[len(axes) :]]
  else:
    windows = [a for a in indexed if a not in numbers.collapsed_slice_dims]
    at = graph.transposed(starts, [*leading, indices.ndim - 1])
    if windows:
      lengths = [indices.shape[a] for a in leading]
      at = graph.reshaped(at, [*lengths, *(1 for _ in windows), len(indexed)])
      offsets = np.indices([sizes[a] for a in windows])
      within = [
        offsets[windows.index(a)] if a in windows else 0 * offsets[0] for a in indexed
      ]
      at = graph.node('Add', [at, graph.constant(np.stack(within, -1))])
    table = graph.transposed(table, [*batched, *indexed, *rest])
    taken = graph.node('GatherND', [table, at], batch_dims=len(batched))
    axes = [*(('lookup', a) for a in leading), *windows, *rest]
  kept = iter(sorted(a for a in axes if not isinstance(a, tuple)))
  lookups = iter(sorted(a for a in axes if isinstance(a, tuple)))
  ndim = len(axes)
  order = [next(kept if a in numbers.offset_dims else lookups) for a in range(ndim)]
  return graph.transposed(taken, [axes.index(a) for a in order])


def _within(graph, indices, last):
  """Returns clipped indices, int64, and which of them had to be clipped not at all.

  Args:
    graph: grows.
    indices: `[..., N]`.
    last: the largest of each.
  """
  indices = graph.cast(indices, np.int64)
  low, high = graph.constant(np.int64(0)), graph.integers(last)
  clipped = graph.node('Min', [graph.node('Max', [indices, low]), high])
  same = graph.node('Equal', [clipped, indices])
  if len(last) > 1:
    all_same = graph.node(
      'ReduceMin', [graph.cast(same, np.int32), graph.integers([-1])], keepdims=1
    )
    same = graph.cast(all_same, bool)
  return clipped, same


def _scatter(reduction):
  def convert(graph, equation, names):
    """Slices that are put into one axis, or one window of several."""
    numbers = equation.params['dimension_numbers']
    x, indices, updates = (atom.aval for atom in equation.invars)
    of_batch = dict(
      zip(numbers.operand_batching_dims, numbers.scatter_indices_batching_dims)
    )
    leading = [a for a in range(updates.ndim) if a not in numbers.update_window_dims]
    others = [a for a in range(len(leading)) if a not in of_batch.values()]
    inserted = numbers.inserted_window_dims
    if len(numbers.scatter_dims_to_operand_dims) != 1 or (
      others and inserted != numbers.scatter_dims_to_operand_dims
    ):
      raise ConfigError('the network scatters along several axes: no ONNX rule')
    (axis,) = numbers.scatter_dims_to_operand_dims
    windows = iter(numbers.update_window_dims)
    # Axes of the updates in the order of the operand's.
    order, shape = [], list(x.shape)
    for a in range(x.ndim):
      if a in of_batch:
        order.append(leading[of_batch[a]])
      elif a not in inserted:
        order.append(next(windows))
      else:
        order += [leading[other] for other in others]
    window = 1 if axis in inserted else updates.shape[order[axis]]
    shape[axis] = math.prod(indices.shape[a] for a in others) * window
    at = _places(graph, equation, names[1], others, of_batch, window)
    at = graph.broadcast(at, shape)
    new = graph.reshaped(graph.transposed(names[2], order), shape)
    # One place more, for what is dropped.
    pads = [0] * (x.ndim + axis) + [1] + [0] * (x.ndim - axis - 1)
    longer = graph.node('Pad', [names[0], graph.integers(pads)])
    y = graph.node('ScatterElements', [longer, at, new], axis=axis, reduction=reduction)
    return graph.sliced(y, axis, 0, x.shape[axis])

  return convert


def _places(graph, equation, indices, others, of_batch, window):
  """Returns where updates go along an axis, int64, beyond its end if they are dropped.

  Args:
    graph: grows.
    equation: of the scattering.
    indices: their name.
    others: the axes of the indices that are not of a batch.
    of_batch: the axes of the indices that are, by the operand's.
    window: elements that are updated from an index on.
  """
  x, about = (atom.aval for atom in equation.invars[:2])
  (axis,) = equation.params['dimension_numbers'].scatter_dims_to_operand_dims
  starts, inside = _within(graph, indices, [x.shape[axis] - window])
  if equation.params['mode'] is _DROPS:
    beyond = graph.constant(np.int64(x.shape[axis]))
    starts = graph.node('Where', [inside, starts, beyond])
  before = [of_batch[a] for a in sorted(of_batch) if a < axis]
  after = [of_batch[a] for a in sorted(of_batch) if a > axis]
  at = graph.transposed(starts, [*before, *others, *after, about.ndim - 1])
  shape = [x.shape[a] if a in of_batch else 1 for a in range(x.ndim)]
  shape[axis] = math.prod(about.shape[a] for a in others)
  at = graph.reshaped(at, shape)
  if window > 1:
    offsets = np.arange(window).reshape([-1 if a == axis else 1 for a in range(x.ndim)])
    at = graph.node('Add', [at, graph.constant(offsets)])
    last = graph.constant(np.int64(x.shape[axis]))
    at, shape[axis] = graph.node('Min', [at, last]), window
  return Tensor(at, tuple(shape))


def _dynamic_update_slice(graph, equation, names):
  """A part that is put into one axis."""
  x, new, *starts = names
  shape, sizes = (atom.aval.shape for atom in equation.invars[:2])
  axes = [a for a, (size, length) in enumerate(zip(sizes, shape)) if size != length]
  if len(axes) > 1 or any(unknown(shape[a]) for a in axes):
    raise ConfigError('the network updates a part of several axes: no ONNX rule')
  for axis in axes:
    size, length = sizes[axis], shape[axis]
    first = graph.cast(starts[axis], np.int64)
    first = graph.node('Max', [first, graph.constant(np.int64(0))])
    first = graph.node('Min', [first, graph.constant(np.int64(length - size))])
    own = np.arange(size).reshape([-1 if a == axis else 1 for a in range(len(shape))])
    at = graph.node('Add', [first, graph.constant(own)])
    at = graph.broadcast(Tensor(at, own.shape), sizes)
    new = graph.node('ScatterElements', [x, at, new], axis=axis)
  return new


RULES = {
  'dynamic_update_slice': _dynamic_update_slice,
  'gather': _gather,
  'scatter': _scatter('none'),
  'scatter-add': _scatter('add'),
}
