"""The network as an ONNX file: QuantizeLinear and DequantizeLinear at each layer."""

import functools
import math
import pathlib
from typing import TYPE_CHECKING

import jax
from jax.extend.core import Primitive
from jax.interpreters import batching
import numpy as np

from fliqs_jax.exporting import folding, loading, native
from fliqs_jax.exporting.deployment import Deployment, symbolic_shapes
from fliqs_jax.exporting.parameters import QuantizedLayer
from fliqs_jax.layers import products
from fliqs_jax.numerics.formats import find_format
from fliqs_jax.numerics.products import against_output

if TYPE_CHECKING:
  from fliqs_jax.exporting.onnx_graph.graph import Graph

FILE = 'model.onnx'
LOADER = 'load_onnx.py'
PACKAGES = ('onnx', 'onnxruntime')
TAKES_PAIRS = False
FOLDS = True

_INTEGERS = ((2, 'INT2'), (4, 'INT4'), (8, 'INT8'))
_FLOATS = {'e4m3': 'FLOAT8E4M3FN', 'e5m2': 'FLOAT8E5M2', 'e2m1': 'FLOAT4E2M1'}


def refused(layer: QuantizedLayer) -> str | None:
  """Returns why a layer cannot be written, one line; None where it can."""
  if name := layer.format_beyond(_FLOATS):
    return f'ONNX export has no type for {name}'
  return None


def write(deployment: Deployment, folder: pathlib.Path) -> dict[str, int]:
  """Writes the network for a batch of any size, and returns what to report of it.

  Raises:
    ConfigError: where it computes something that has no counterpart in ONNX.
  """
  # It needs an extra of the package, as exports alone do.
  from fliqs_jax.exporting.onnx_graph import conversion

  shapes = symbolic_shapes(deployment.inputs[0])
  function, report = folding.network(deployment, shapes, _marked)
  own = {_layer.name: functools.partial(_add_layer, deployment, {})}
  model = conversion.make_model(function, shapes, own)
  (folder / FILE).write_bytes(model.SerializeToString())
  return report


def outputs(deployment: Deployment, folder: pathlib.Path) -> list[list[np.ndarray]]:
  """Returns the outputs that a new process computes with ONNX Runtime."""
  return loading.run_batches(folder / LOADER, folder / FILE, batches=deployment.inputs)


# Stands for a layer in a traced network, until it is written.
_layer = Primitive(folding.MARK)
_layer.multiple_results = True
_OF_OPERANDS = (
  'einsum',
  'conv_transpose',
)  # kinds whose products are computed elsewhere


@_layer.def_abstract_eval
def _layer_shapes(x, *other, path, layer):
  x = jax.ShapeDtypeStruct(x.shape, x.dtype)
  w = jax.ShapeDtypeStruct(layer.kernel_shape, x.dtype)
  if layer.kind in _OF_OPERANDS:
    results = x, w
  else:
    results = [jax.eval_shape(products.rebuilt(layer).function, x, w)]
  return [jax.core.ShapedArray(a.shape, a.dtype) for a in results]


def _map_layer(operands, axes, **params):
  """Examples of a batch of one that are mapped are examples of one batch."""
  (x, *other), (axis, *_) = operands, axes
  if params['layer'].kind in _OF_OPERANDS:  # whatever shape it has is rounded
    return _layer.bind(x, *other, **params), [axis, None]
  x = jax.numpy.moveaxis(x, axis, 0)
  (y,) = _layer.bind(x.reshape(-1, *x.shape[2:]), *other, **params)
  return [y.reshape(x.shape[0], x.shape[1], *y.shape[1:])], [0]


batching.primitive_batchers[_layer] = _map_layer


def _marked(layer, x, product, element):
  own_scale = None
  if layer.activation_scale is None and _is_scaled(layer.activations):
    own_scale = native.own_scale(layer, x, product)
    x = x * (1 / own_scale)
  scale = folding.output_scale(layer, product)
  other = [a for a in (element, scale) if a is not None]
  results = _layer.bind(x, *other, path=layer.layer.path, layer=layer.layer)
  if own_scale is None:
    return tuple(results) if layer.layer.kind in _OF_OPERANDS else results[0]
  if layer.layer.kind in _OF_OPERANDS:
    x, w = results
    return x * own_scale, w
  return results[0] * against_output(own_scale, product.x_kept, results[0].ndim)


def _is_scaled(name):
  return find_format(name).family != 'unscaled'


def _add_layer(deployment, known, graph: 'Graph', equation, given):
  """Adds a layer: its input rounded, its weights decoded, and their product.

  Args:
    deployment: the network.
    known: layers by what tells them apart, so that one that is called again, in a scan
      say, has its weights once.
    graph: grows.
    equation: the layer's.
    given: its input, and the scale of its weights or its place in a stack.
  """
  from fliqs_jax.exporting.onnx_graph.graph import Tensor

  (x, *other), aval = given, equation.invars[0].aval
  path = equation.params['path']
  key = path, *(np.asarray(value).tobytes() for value in other)
  if key not in known:
    known[key] = _one_layer(deployment.layers[path], *other)
  layer = known[key]
  x = graph.broadcast(x, aval.shape)
  if layer.layer.kind in _OF_OPERANDS:
    results = [_rounded(graph, layer, x, False), _weights(graph, layer)]
  elif layer.layer.kind == 'conv':
    results = [_convolution(graph, layer, x, aval.shape)]
  else:
    results = [_product(graph, layer, x, aval.shape)]
  shapes = [tuple(var.aval.shape) for var in equation.outvars]
  if layer.layer.kind == 'dense':
    results = [graph.reshaped(results[0], shapes[0])]
  return list(map(Tensor, results, shapes))


def _one_layer(layer, *other):
  """Returns the layer of a stack that computes, or one with another scale.

  Its scales are positive, as ONNX's are.
  """
  if layer.stack:
    return layer.element(int(other[0]))
  if not other:
    return layer
  layer = folding.with_output_scale(layer, products.rebuilt(layer.layer), other[0])
  signs = np.where(layer.weight_scale < 0, -1, 1)
  codes = (signs * layer.codes.astype(np.float32)).astype(layer.codes.dtype)
  return layer._replace(codes=codes, weight_scale=np.abs(layer.weight_scale))


def _convolution(graph, layer, x, x_shape):
  from fliqs_jax.exporting.onnx_graph.products import convolution

  params = dict(layer.layer.arguments)
  numbers = params['dimension_numbers']
  params['padding'] = _padding(params, x_shape, layer.codes.shape)
  w = _decoded(graph, layer, layer.codes.transpose(numbers.rhs_spec), 0)
  # Rounded in the order of ONNX's axes, so that nothing stands before the product.
  x = _rounded(graph, layer, graph.transposed(x, numbers.lhs_spec))
  return convolution(graph, params, x, w, x_shape, in_onnx_order=True)


def _product(graph, layer, x, x_shape):
  """Adds a product, of which the result has the axes of both flattened or not."""
  from fliqs_jax.exporting.onnx_graph.products import dot_general

  numbers = dict(layer.layer.arguments)['dimension_numbers']
  (x_axes, w_axes), (x_batch, _) = numbers
  # ONNX Runtime 1.32 takes no weights that are decoded for two products of integers.
  is_called_again = layer.layer.calls > layer.layer.kernels
  if x_batch or is_called_again:
    x, w = _rounded(graph, layer, x, False), _weights(graph, layer)
    return dot_general(graph, numbers, (len(x_shape), layer.codes.ndim), [x, w])
  own = [a for a in range(len(x_shape)) if a not in x_axes]
  contracted = math.prod(x_shape[a] for a in x_axes)
  w_own = [a for a in range(layer.codes.ndim) if a not in w_axes]
  codes = layer.codes.transpose(*w_axes, *w_own).reshape(contracted, -1)
  x = graph.transposed(x, [*own, *x_axes])
  x = graph.reshaped(x, (*(x_shape[a] for a in own), contracted))
  x, w = _rounded(graph, layer, x), _decoded(graph, layer, codes, 1)
  return graph.node('MatMul', [x, w])


def _padding(params, x_shape, w_shape):
  """Returns pairs for the padding of a convolution, which may be a word."""
  if not isinstance(params['padding'], str):
    return params['padding']
  numbers = params['dimension_numbers']
  space = [x_shape[axis] for axis in numbers.lhs_spec[2:]]
  dilation = params.get('rhs_dilation') or (1,) * len(space)
  window = [
    (w_shape[axis] - 1) * d + 1 for axis, d in zip(numbers.rhs_spec[2:], dilation)
  ]
  return jax.lax.padtype_to_pads(
    space, window, params['window_strides'], params['padding']
  )


def _onnx_type(name):
  """Returns ONNX's number of the type that holds a format."""
  from onnx import TensorProto

  format = find_format(name)
  if format.family == 'int':
    return getattr(TensorProto, next(t for bits, t in _INTEGERS if bits >= format.bits))
  return getattr(TensorProto, _FLOATS[name])


def _rounded(graph, layer, x, before_product=True):
  """Adds the rounding of a layer's input.

  Args:
    graph: grows.
    layer: the layer.
    x: the input.
    before_product: whether its product follows at once. Where it may not, the scale is
      multiplied by itself: ONNX Runtime 1.32 moves the decoding of int8 behind what
      else follows, with zero points of another type, and refuses the result.
  """
  from onnx import TensorProto

  format = find_format(layer.activations)
  if format.name == 'float32':
    return x
  if format.name == 'bf16':
    x = graph.node('Cast', [x], to=TensorProto.BFLOAT16)
    return graph.node('Cast', [x], to=TensorProto.FLOAT)
  # Where the input sets its own scale, it is multiplied and divided by that outside.
  scale = np.float32(1 if layer.activation_scale is None else layer.activation_scale)
  if format.family == 'int':
    # ONNX's integers reach one further down than up, those of the search do not.
    # (Not by Clip, at which ONNX Runtime 1.32 stumbles before types of four bits.)
    limit = np.float32(format.largest) * scale
    x = graph.node(
      'Min', [graph.node('Max', [x, graph.constant(-limit)]), graph.constant(limit)]
    )
  scale = graph.constant(scale)
  zero = graph.constant(np.zeros(()), _onnx_type(format.name))
  codes = graph.node('QuantizeLinear', [x, scale, zero])
  if before_product:
    return graph.node('DequantizeLinear', [codes, scale, zero])
  one = graph.constant(np.float32(1))
  return graph.node('Mul', [graph.node('DequantizeLinear', [codes, one, zero]), scale])


def _weights(graph, layer):
  """Adds the decoded weights of a layer, once, with the axes of its kernel."""
  return graph.once(id(layer), functools.partial(_add_weights, graph, layer))


def _add_weights(graph, layer):
  if not _is_scaled(layer.weights):
    return _decoded(graph, layer, layer.codes, 0)
  # Scales may lie along several axes, of which the operation has one.
  dtype = _onnx_type(layer.weights)
  one, zero = graph.constant(np.float32(1)), graph.constant(np.zeros(()), dtype)
  w = graph.node('DequantizeLinear', [graph.constant(layer.codes, dtype), one, zero])
  return graph.node('Mul', [w, graph.constant(layer.weight_scale)])


def _decoded(graph, layer, codes, axis):
  """Adds the codes of a layer's weights and their decoding.

  Args:
    graph: grows.
    layer: the layer.
    codes: its codes.
    axis: along which the scales lie.
  """
  from onnx import TensorProto

  format = find_format(layer.weights)
  if format.name == 'float32':
    return graph.constant(codes)
  if format.name == 'bf16':
    w = graph.constant(codes, TensorProto.BFLOAT16)
    return graph.node('Cast', [w], to=TensorProto.FLOAT)
  dtype, scales = _onnx_type(format.name), layer.weight_scale.ravel()
  zeros = graph.constant(np.zeros(scales.shape), dtype)
  inputs = [graph.constant(codes, dtype), graph.constant(scales), zeros]
  return graph.node('DequantizeLinear', inputs, axis=axis)
