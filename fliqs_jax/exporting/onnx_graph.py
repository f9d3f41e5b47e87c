"""An ONNX graph from a traced network, for a batch whose size is not known.

Tensors that are broadcast stay small as long as what reads them broadcasts too, as all
of ONNX's elementwise operations do. What depends on no input is computed here.
bfloat16 is computed in float32, since ONNX Runtime has little of it on CPUs.
"""

from collections.abc import Callable, Sequence
import string
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import onnx
from onnx import helper

from fliqs_jax.errors import ConfigError

OPSET = 25  # the first with int2, as with all types of quantization so far


class Tensor(NamedTuple):
  """A tensor of the graph, which may have a length of 1 where it is to be broadcast."""

  name: str
  shape: tuple[Any, ...]  # as it is in the graph; the batch is a symbolic dimension


class Graph:
  """Nodes and constants of a graph that grows.

  Attributes:
    nodes: in the order in which they are computed.
    constants: tensors with their values, by name.
  """

  def __init__(self):
    """An empty graph."""
    self.nodes: list[onnx.NodeProto] = []
    self.constants: list[onnx.TensorProto] = []
    self._count = 0
    self.batch = ''  # name of int64[1], the size of the batch

  def name(self) -> str:
    """Returns a name that no other tensor has."""
    self._count += 1
    return f't{self._count}'

  def node(self, operation: str, inputs: Sequence[str], **attributes: Any) -> str:
    """Adds an operation with one output, and returns that output's name."""
    name = self.name()
    self.nodes.append(helper.make_node(operation, inputs, [name], **attributes))
    return name

  def constant(self, array: np.ndarray, dtype: int | None = None) -> str:
    """Adds a constant, and returns its name.

    Args:
      array: of a type that numpy has, but for bfloat16, which becomes float32.
      dtype: of `onnx.TensorProto`, for values that are exact in it; None for the
        array's own.
    """
    name, array = self.name(), np.asarray(array)
    if dtype is None:
      array = array.astype(plain(array.dtype))
      tensor = onnx.numpy_helper.from_array(array, name)
    else:
      values = array.astype(np.float32).ravel().tolist()
      tensor = helper.make_tensor(name, dtype, array.shape, values)
    self.constants.append(tensor)
    return name

  def integers(self, values: Sequence[int]) -> str:
    """Adds a constant vector of integers, as shapes and axes are given."""
    return self.constant(np.array(values, np.int64))

  def reshaped(self, name: str, shape: Sequence[Any]) -> str:
    """Returns a tensor in another shape, of which one length may be unknown."""
    lengths = [-1 if unknown(length) else length for length in shape]
    if lengths.count(-1) > 1:
      raise ConfigError(f'ONNX cannot reshape to {shape}: two lengths are unknown')
    return self.node('Reshape', [name, self.integers(lengths)])

  def transposed(self, name: str, permutation: Sequence[int]) -> str:
    """Returns a tensor with its axes in another order."""
    return self.node('Transpose', [name], perm=list(permutation))

  def broadcast(self, tensor: Tensor, shape: Sequence[Any]) -> str:
    """Returns the name of a tensor that has all elements of a shape."""
    if tuple(tensor.shape) == tuple(shape):
      return tensor.name
    parts = [
      self.batch if unknown(length) else self.integers([length]) for length in shape
    ]
    target = self.node('Concat', parts, axis=0) if parts else self.integers([])
    return self.node('Expand', [tensor.name, target])


def unknown(length: Any) -> bool:
  """Returns whether a length depends on the size of the batch."""
  return not isinstance(length, (int, np.integer))


def plain(dtype: Any) -> np.dtype:
  """Returns the type in which the graph computes what JAX does in `dtype`."""
  dtype = np.dtype(dtype)
  return np.dtype(np.float32) if dtype == jnp.bfloat16 else dtype


def onnx_dtype(dtype: Any) -> int:
  """Returns ONNX's number of a type."""
  return helper.np_dtype_to_tensor_dtype(plain(dtype))


# (graph, equation, values of its inputs) -> values of its outputs
Convert = Callable[[Graph, Any, list[Any]], list[Tensor]]


def add_jaxpr(
  graph: Graph, jaxpr: Any, consts: Sequence[Any], inputs: Sequence[Any], own: dict
) -> list[Any]:
  """Adds the equations of a jaxpr to a graph, and returns what its outputs are.

  A value is a `Tensor`, or an array where it depends on no input.

  Args:
    graph: grows.
    jaxpr: the open one.
    consts: of its constants.
    inputs: values.
    own: how further primitives are converted, by name.

  Raises:
    ConfigError: for a primitive that ONNX has no operation for.
  """
  values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *inputs]))

  def read(atom):
    return atom.val if hasattr(atom, 'val') else values[atom]

  for equation in jaxpr.eqns:
    given = [read(atom) for atom in equation.invars]
    name = equation.primitive.name
    inner = next((equation.params[k] for k in _INNER if k in equation.params), None)
    if name in own:
      results = own[name](graph, equation, given)
    elif _is_known(equation, given):
      results = _computed(equation, given)
    elif inner is not None and name not in _LOOPS:
      open_jaxpr = getattr(inner, 'jaxpr', inner)
      results = add_jaxpr(graph, open_jaxpr, getattr(inner, 'consts', ()), given, own)
    else:
      results = _convert(graph, equation, given)
    values.update(zip(equation.outvars, results))
  return [read(atom) for atom in jaxpr.outvars]


_INNER = ('jaxpr', 'call_jaxpr', 'fun_jaxpr')  # the name depends on the primitive
_LOOPS = ('scan', 'while', 'cond')


def _is_known(equation, given):
  lengths = [length for var in equation.outvars for length in var.aval.shape]
  no_tensor = not any(isinstance(value, Tensor) for value in given)
  return no_tensor and not any(map(unknown, lengths))


def _computed(equation, given):
  values = [jnp.asarray(value) for value in given]
  results = equation.primitive.bind(*values, **equation.params)
  results = results if equation.primitive.multiple_results else [results]
  return [np.asarray(result) for result in results]


def _convert(graph, equation, given):
  name = equation.primitive.name
  avals = [atom.aval for atom in equation.invars]
  tensors = [
    value
    if isinstance(value, Tensor)
    else Tensor(graph.constant(value), tuple(np.shape(value)))
    for value in given
  ]
  output = equation.outvars[0].aval
  if name in _ELEMENTWISE:
    result = _ELEMENTWISE[name](graph, equation.params, [t.name for t in tensors])
    shape = _broadcast_shape([t.shape for t in tensors], output.ndim)
    return [Tensor(result, shape)]
  if name == 'broadcast_in_dim':
    return [_broadcast_in_dim(graph, equation.params, tensors[0], output)]
  if name not in _OTHERS:
    raise ConfigError(
      f'the network computes {name!r}, for which ONNX export has no rule'
    )
  whole = [graph.broadcast(t, aval.shape) for t, aval in zip(tensors, avals)]
  results = _OTHERS[name](graph, equation, whole)
  results = results if isinstance(results, list) else [results]
  return [Tensor(r, tuple(v.aval.shape)) for r, v in zip(results, equation.outvars)]


def _broadcast_shape(shapes, rank):
  padded = [(1,) * (rank - len(shape)) + tuple(shape) for shape in shapes]
  return tuple(
    next((length for length in lengths if unknown(length) or length != 1), 1)
    for lengths in zip(*padded)
  )


def _broadcast_in_dim(graph, params, tensor, output):
  kept = dict(zip(params['broadcast_dimensions'], tensor.shape))
  shape = tuple(kept.get(axis, 1) for axis in range(output.ndim))
  return Tensor(graph.reshaped(tensor.name, shape), shape)


def _simple(operation):
  return lambda graph, params, names: graph.node(operation, names)


def _chain(*operations):
  def convert(graph, params, names):
    for operation in operations:
      names = [graph.node(operation, names)]
    return names[0]

  return convert


def _integer_pow(graph, params, names):
  exponent = graph.constant(np.float32(params['y']))
  return graph.node('Pow', [*names, exponent])


def _square(graph, params, names):
  return graph.node('Mul', names * 2)


def _cast(graph, params, names):
  return graph.node('Cast', names, to=onnx_dtype(params['new_dtype']))


def _clamp(graph, params, names):
  low, x, high = names
  return graph.node('Min', [graph.node('Max', [x, low]), high])


def _select(graph, params, names):
  which, otherwise, chosen = names
  return graph.node('Where', [which, chosen, otherwise])


def _erfc(graph, params, names):
  one = graph.constant(np.float32(1))
  return graph.node('Sub', [one, graph.node('Erf', names)])


def _round(graph, params, names):
  if params['rounding_method'] is not lax.RoundingMethod.TO_NEAREST_EVEN:
    raise ConfigError('the network rounds away from zero, which ONNX cannot')
  return graph.node('Round', names)


_ELEMENTWISE = {
  **{
    name: _simple(operation)
    for name, operation in {
      'abs': 'Abs', 'add': 'Add', 'and': 'And', 'ceil': 'Ceil', 'copy': 'Identity',
      'copy_p': 'Identity', 'cos': 'Cos', 'div': 'Div', 'eq': 'Equal', 'erf': 'Erf',
      'exp': 'Exp', 'floor': 'Floor', 'ge': 'GreaterOrEqual', 'gt': 'Greater',
      'le': 'LessOrEqual', 'log': 'Log', 'logistic': 'Sigmoid', 'lt': 'Less',
      'max': 'Max', 'min': 'Min', 'mul': 'Mul', 'neg': 'Neg', 'not': 'Not', 'or': 'Or',
      'pow': 'Pow', 'sign': 'Sign', 'sin': 'Sin', 'sqrt': 'Sqrt',
      'stop_gradient': 'Identity', 'sub': 'Sub', 'tanh': 'Tanh',
    }.items()
  },
  'clamp': _clamp,
  'convert_element_type': _cast,
  'erfc': _erfc,
  'integer_pow': _integer_pow,
  'ne': _chain('Equal', 'Not'),
  'round': _round,
  'rsqrt': _chain('Sqrt', 'Reciprocal'),
  'select_n': _select,
  'square': _square,
}  # fmt: skip


def _reduce(operation):
  def convert(graph, equation, names):
    axes = graph.integers(equation.params['axes'])
    return graph.node(operation, [*names, axes], keepdims=0)

  return convert


def _argmax(graph, equation, names):
  (axis,) = equation.params['axes']
  found = graph.node('ArgMax', names, axis=axis, keepdims=0)
  return graph.node('Cast', [found], to=onnx_dtype(equation.params['index_dtype']))


def _reshape(graph, equation, names):
  return graph.reshaped(names[0], equation.outvars[0].aval.shape)


def _transpose(graph, equation, names):
  return graph.transposed(names[0], equation.params['permutation'])


def _concatenate(graph, equation, names):
  return graph.node('Concat', names, axis=equation.params['dimension'])


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
  outputs = [graph.name() for _ in equation.outvars]
  sizes = graph.integers(equation.params['sizes'])
  axis = equation.params['axis']
  graph.nodes.append(helper.make_node('Split', [names[0], sizes], outputs, axis=axis))
  return outputs


def _pad(graph, equation, names):
  config = equation.params['padding_config']
  if any(interior for _, _, interior in config):
    raise ConfigError('the network pads between elements, which ONNX cannot')
  pads = [low for low, _, _ in config] + [high for _, high, _ in config]
  return graph.node('Pad', [names[0], graph.integers(pads), names[1]])


def _gather(graph, equation, names):
  """Slices of one axis, as an embedding and a fixed index take them."""
  numbers, params = equation.params['dimension_numbers'], equation.params
  table, indices = (atom.aval for atom in equation.invars)
  axis, lookups = (*numbers.start_index_map, 0)[0], indices.ndim - 1
  sizes = (*table.shape[:axis], 1, *table.shape[axis + 1 :])
  kept = (*range(axis), *range(axis + lookups, table.ndim - 1 + lookups))
  if (
    numbers.start_index_map != (axis,)
    or numbers.collapsed_slice_dims != (axis,)
    or tuple(params['slice_sizes']) != sizes
    or numbers.offset_dims != kept
  ):
    raise ConfigError('the network gathers along several axes: ONNX export has no rule')
  flat = graph.reshaped(names[1], indices.shape[:-1])
  # JAX masks or clips an index out of the table, ONNX Runtime refuses it.
  last = graph.constant(np.array(table.shape[axis] - 1, indices.dtype))
  zero = graph.constant(np.array(0, indices.dtype))
  inside = graph.node('Min', [graph.node('Max', [flat, zero]), last])
  return graph.node('Gather', [names[0], inside], axis=axis)


def _dot_general(graph, equation, names):
  contract, batch = equation.params['dimension_numbers']
  letters = iter(string.ascii_lowercase)
  axes = [[None] * atom.aval.ndim for atom in equation.invars]
  for pairs in (batch, contract):
    for left, right in zip(*pairs):
      axes[0][left] = axes[1][right] = next(letters)
  shared = [axes[0][axis] for axis in batch[0]]
  own = []
  for operand in axes:
    for axis, letter in enumerate(operand):
      if letter is None:
        operand[axis] = next(letters)
        own.append(operand[axis])
  equation_text = f'{"".join(axes[0])},{"".join(axes[1])}->{"".join(shared + own)}'
  return graph.node('Einsum', names, equation=equation_text)


def convolution(
  graph: Graph, params: Any, x: str, w: str, in_onnx_order: bool = False
) -> str:
  """Adds a convolution, and returns its name.

  Args:
    graph: grows.
    params: of `lax.conv_general_dilated`, padding as pairs.
    x: the input.
    w: the weights.
    in_onnx_order: whether the axes of both are in ONNX's order already.
  """
  numbers = params['dimension_numbers']
  if any(d != 1 for d in params.get('lhs_dilation') or ()):
    raise ConfigError('the network dilates the input of a convolution: no ONNX rule')
  if not in_onnx_order:
    x = graph.transposed(x, numbers.lhs_spec)
    w = graph.transposed(w, numbers.rhs_spec)
  padding = params['padding']
  y = graph.node(
    'Conv',
    [x, w],
    strides=list(params['window_strides']),
    pads=[low for low, _ in padding] + [high for _, high in padding],
    dilations=list(params.get('rhs_dilation') or (1,) * len(padding)),
    group=params.get('feature_group_count', 1),
  )
  return graph.transposed(y, np.argsort(numbers.out_spec))


def _convolution(graph, equation, names):
  return convolution(graph, equation.params, *names)


def _pool(operation):
  def convert(graph, equation, names):
    params, rank = equation.params, equation.invars[0].aval.ndim
    window, strides = params['window_dimensions'], params['window_strides']
    space = [axis for axis in range(rank) if window[axis] != 1 or strides[axis] != 1]
    dilated = any(
      d != 1 for d in (*params['base_dilation'], *params['window_dilation'])
    )
    if dilated or len(space) + 2 > rank:
      raise ConfigError('the network pools over batch or channels: no ONNX rule')
    order = [axis for axis in range(rank) if axis not in space]
    # Whatever is not pooled over is the batch and the channels.
    while len(order) > 2:
      space.insert(0, order.pop(1))
    order += sorted(space)
    padding = [params['padding'][axis] for axis in sorted(space)]
    attributes = {'count_include_pad': 1} if operation == 'AveragePool' else {}
    y = graph.node(
      operation,
      [graph.transposed(names[0], order)],
      kernel_shape=[window[axis] for axis in sorted(space)],
      strides=[strides[axis] for axis in sorted(space)],
      pads=[low for low, _ in padding] + [high for _, high in padding],
      **attributes,
    )
    if operation == 'AveragePool':  # of which the sum is wanted
      y = graph.node('Mul', [y, graph.constant(np.float32(np.prod(window)))])
    return graph.transposed(y, np.argsort(order))

  return convert


_OTHERS = {
  'argmax': _argmax,
  'concatenate': _concatenate,
  'conv_general_dilated': _convolution,
  'dot_general': _dot_general,
  'expand_dims': _reshape,
  'gather': _gather,
  'pad': _pad,
  'reduce_max': _reduce('ReduceMax'),
  'reduce_min': _reduce('ReduceMin'),
  'reduce_sum': _reduce('ReduceSum'),
  'reduce_window_max': _pool('MaxPool'),
  'reduce_window_sum': _pool('AveragePool'),
  'reshape': _reshape,
  'slice': _slice,
  'split': _split,
  'squeeze': _reshape,
  'transpose': _transpose,
}


def make_model(
  function: Callable[..., Any],
  shapes: Sequence[jax.ShapeDtypeStruct],
  own: dict[str, Convert],
) -> onnx.ModelProto:
  """Returns the ONNX model of a function of arrays.

  Args:
    function: traced by JAX.
    shapes: of its inputs, the batch first in each.
    own: how primitives that JAX does not have itself are converted, by name.

  Raises:
    ConfigError: for something that has no counterpart in ONNX.
  """
  jaxpr = jax.make_jaxpr(function)(*shapes)
  graph = Graph()
  inputs = [Tensor(f'input_{i}', shape.shape) for i, shape in enumerate(shapes)]
  graph.batch = graph.node('Shape', [inputs[0].name], start=0, end=1)
  results = add_jaxpr(graph, jaxpr.jaxpr, jaxpr.consts, inputs, own)
  outputs = []
  for i, (value, aval) in enumerate(zip(results, jaxpr.out_avals)):
    if not isinstance(value, Tensor):
      value = Tensor(graph.constant(value), tuple(np.shape(value)))
    whole = graph.broadcast(value, aval.shape)
    graph.nodes.append(helper.make_node('Identity', [whole], [f'output_{i}']))
    outputs.append(_value_info(f'output_{i}', aval))
  infos = [_value_info(t.name, shape) for t, shape in zip(inputs, shapes)]
  proto = helper.make_graph(graph.nodes, 'network', infos, outputs, graph.constants)
  opsets = [helper.make_opsetid('', OPSET)]
  return helper.make_model(proto, opset_imports=opsets, producer_name='fliqs_jax')


def _value_info(name, aval):
  lengths = [str(length) if unknown(length) else length for length in aval.shape]
  return helper.make_tensor_value_info(name, onnx_dtype(aval.dtype), lengths)
