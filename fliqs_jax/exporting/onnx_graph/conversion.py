"""A traced network as an ONNX model, for a batch whose size is not known.

What depends on no input is computed here.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend import core
import jax.numpy as jnp
import numpy as np
import onnx
from onnx import helper

from fliqs_jax.errors import ConfigError
from fliqs_jax.exporting.onnx_graph import elementwise, indexing, products, reductions
from fliqs_jax.exporting.onnx_graph import shapes as reshaping
from fliqs_jax.exporting.onnx_graph.graph import Graph, Tensor, onnx_dtype, unknown

OPSET = 25  # the first with int2, as with all types of quantization so far

_OTHERS = indexing.RULES | products.RULES | reductions.RULES | reshaping.RULES

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
    if isinstance(atom, core.Literal):
      return np.asarray(atom.val, atom.aval.dtype)
    return values[atom]

  for equation in jaxpr.eqns:
    given, name = [read(atom) for atom in equation.invars], equation.primitive.name
    inner = next((equation.params[k] for k in _INNER if k in equation.params), None)
    if name in own:
      results = own[name](graph, equation, given)
    elif inner is not None and name not in _LOOPS:
      results = _add_inner(graph, inner, given, own)
    elif name == 'dim_as_value':
      results = [Tensor(graph.length(equation.params['dim']), ())]
    elif _is_known(equation, given):
      results = _computed(equation, given)
    elif name == 'scan':
      results = _unrolled(graph, equation, given, own)
    elif name == 'cond' and not isinstance(given[0], Tensor):
      branch = equation.params['branches'][int(given[0])]
      results = _add_inner(graph, branch, given[1:], own)
    else:
      results = _convert(graph, equation, given)
    values.update(zip(equation.outvars, results))
  return [read(atom) for atom in jaxpr.outvars]


_INNER = ('jaxpr', 'call_jaxpr', 'fun_jaxpr')  # the name depends on the primitive
_LOOPS = ('scan', 'while', 'cond')


def _add_inner(graph, jaxpr, given, own):
  consts = getattr(jaxpr, 'consts', ())
  return add_jaxpr(graph, getattr(jaxpr, 'jaxpr', jaxpr), consts, given, own)


def _unrolled(graph, equation, given, own):
  """Adds the body of a scan as often as it runs."""
  params, length = equation.params, equation.params['length']
  num_consts, num_carry = params['num_consts'], params['num_carry']
  consts, carry, stacks = (
    given[:num_consts],
    given[num_consts:][:num_carry],
    given[num_consts + num_carry :],
  )
  results = []
  for index in range(length)[:: -1 if params['reverse'] else 1]:
    parts = [_part(graph, stack, index) for stack in stacks]
    outputs = _add_inner(graph, params['jaxpr'], [*consts, *carry, *parts], own)
    carry = outputs[:num_carry]
    results.append(outputs[num_carry:])
  results = results[:: -1 if params['reverse'] else 1]
  shapes = [var.aval.shape for var in equation.outvars[num_carry:]]
  stacked = [_stacked(graph, *pair) for pair in zip(zip(*results), shapes)]
  return [*carry, *stacked]


def _part(graph, stack, index):
  """Returns one element of what a scan runs over."""
  if not isinstance(stack, Tensor):
    return stack[index]
  shape = stack.shape[1:]
  if stack.shape[0] == 1:  # to be broadcast
    index = 0
  part = graph.sliced(stack.name, 0, index, index + 1)
  return Tensor(graph.reshaped(part, shape), shape)


def _stacked(graph, parts, shape):
  """Returns what a scan has given at each of its steps, as one value."""
  if not any(isinstance(part, Tensor) for part in parts):
    return np.stack(parts)
  one = (1, *shape[1:])
  rows = [
    graph.reshaped(graph.broadcast(_tensor(graph, part), shape[1:]), one)
    for part in parts
  ]
  return Tensor(graph.node('Concat', rows, axis=0), tuple(shape))


def _tensor(graph, value):
  if isinstance(value, Tensor):
    return value
  return Tensor(graph.constant(value), tuple(np.shape(value)))


def _is_known(equation, given):
  lengths = [length for var in equation.outvars for length in var.aval.shape]
  no_tensor = not any(isinstance(value, Tensor) for value in given)
  return no_tensor and not any(map(unknown, lengths))


def _computed(equation, given):
  values = [jnp.asarray(value) for value in given]
  results = equation.primitive.bind(*values, **equation.params)
  results = results if equation.primitive.multiple_results else [results]
  return [
    # Keys of random numbers are of no type of NumPy.
    r if jnp.issubdtype(r.dtype, jax.dtypes.prng_key) else np.asarray(r)
    for r in results
  ]


def _convert(graph, equation, given):
  name = equation.primitive.name
  avals = [atom.aval for atom in equation.invars]
  tensors = [_tensor(graph, value) for value in given]
  output = equation.outvars[0].aval
  if name in elementwise.RULES:
    result = elementwise.RULES[name](graph, equation, [t.name for t in tensors])
    shape = _broadcast_shape([t.shape for t in tensors], output.ndim)
    return [Tensor(result, shape)]
  if name == 'broadcast_in_dim':
    return [_broadcast_in_dim(graph, equation.params, tensors[0], output)]
  if name == 'iota':
    return [_iota(graph, equation.params['dimension'], output)]
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


def _iota(graph, axis, output):
  """Returns the numbers along an axis, which are the same along the batch."""
  if unknown(output.shape[axis]):
    raise ConfigError('the network numbers its examples, for which ONNX has no rule')
  shape = tuple(n if a == axis else 1 for a, n in enumerate(output.shape))
  numbers = np.arange(output.shape[axis], dtype=output.dtype).reshape(shape)
  return Tensor(graph.constant(numbers), shape)


def make_model(
  function: Callable[..., Any],
  shapes: Sequence[jax.ShapeDtypeStruct],
  own: dict[str, Convert],
) -> onnx.ModelProto:
  """Returns the checked ONNX model of a function of arrays.

  Args:
    function: traced by JAX.
    shapes: of its inputs, the batch first in each.
    own: how primitives that JAX does not have itself are converted, by name.

  Raises:
    ConfigError: for something that has no counterpart in ONNX.
  """
  jaxpr = jax.make_jaxpr(function)(*shapes)
  graph = Graph()
  inputs = [Tensor(f'input_{i}', given.shape) for i, given in enumerate(shapes)]
  graph.batch = graph.node('Shape', [inputs[0].name], start=0, end=1)
  given = [
    tensor
    if aval.dtype == shape.dtype
    else Tensor(graph.cast(tensor.name, aval.dtype), tensor.shape)
    for tensor, aval, shape in zip(inputs, jaxpr.in_avals, shapes)
  ]
  results = add_jaxpr(graph, jaxpr.jaxpr, jaxpr.consts, given, own)
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
  model = helper.make_model(proto, opset_imports=opsets, producer_name='fliqs_jax')
  try:
    onnx.checker.check_model(model, full_check=True)
  except _INVALID as error:
    reason = str(error).strip().splitlines()[0]
    raise ConfigError(f'ONNX cannot express the network: {reason}') from None
  return model


# Of types that an operation does not take, and of more bytes than a file may have.
_INVALID = (
  onnx.checker.ValidationError,
  onnx.shape_inference.InferenceError,
  ValueError,
)


def _value_info(name, aval):
  lengths = [str(length) if unknown(length) else length for length in aval.shape]
  return helper.make_tensor_value_info(name, onnx_dtype(aval.dtype), lengths)
