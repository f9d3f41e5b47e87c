"""The network as an ONNX file: QuantizeLinear and DequantizeLinear at each layer."""

import functools
import pathlib
from typing import TYPE_CHECKING

import jax
from jax.extend.core import Primitive
from jax.interpreters import batching
import numpy as np

from fliqs_jax.errors import ConfigError
from fliqs_jax.exporting import deployment as deployments
from fliqs_jax.exporting import loading
from fliqs_jax.exporting.deployment import Deployment
from fliqs_jax.exporting.parameters import QuantizedLayer
from fliqs_jax.layers import products
from fliqs_jax.numerics.formats import find_format

if TYPE_CHECKING:
  from fliqs_jax.exporting.onnx_graph import Graph

FILE = 'model.onnx'
LOADER = 'load_onnx.py'
PACKAGES = ('onnx', 'onnxruntime')
TAKES_PAIRS = False

_INTEGERS = ((2, 'INT2'), (4, 'INT4'), (8, 'INT8'))
_FLOATS = {'e4m3': 'FLOAT8E4M3FN', 'e5m2': 'FLOAT8E5M2', 'e2m1': 'FLOAT4E2M1'}


def refused(layer: QuantizedLayer) -> str | None:
  """Returns why a layer cannot be written, one line; None where it can."""
  for name in (layer.weights, layer.activations):
    format = find_format(name)
    if format.block or (format.family == 'float' and name not in _FLOATS):
      return f'ONNX export has no type for {name}'
  if layer.layer.kind not in ('conv', 'dense'):
    return f'it is of kind {layer.layer.kind}, whose operands ONNX export cannot mark'
  if layer.stack:
    return 'it is one of a stack that the network scans over'
  if layer.activation_scale is None:
    return 'its input sets its own scale, for which ONNX has no one operation'
  return None


def write(deployment: Deployment, folder: pathlib.Path) -> None:
  """Writes the network for a batch of any size, and checks the file.

  Raises:
    ConfigError: where it computes something that has no counterpart in ONNX.
  """
  # An extra of the package, which exports alone need.
  import onnx

  from fliqs_jax.exporting import onnx_graph

  function = functools.partial(deployment.deployed, compute=_marked)
  shapes = deployments.symbolic_shapes(deployment.inputs[0])
  function = deployments.of_any_batch(function, shapes)
  own = {_layer.name: functools.partial(_add_layer, deployment)}
  model = onnx_graph.make_model(function, shapes, own)
  onnx.checker.check_model(model, full_check=True)
  (folder / FILE).write_bytes(model.SerializeToString())


def outputs(deployment: Deployment, folder: pathlib.Path) -> list[list[np.ndarray]]:
  """Returns the outputs that a new process computes with ONNX Runtime."""
  return loading.run_batches(folder / LOADER, folder / FILE, batches=deployment.inputs)


# Stands for a layer in a traced network, until it is written.
_layer = Primitive('deployed_layer')


@_layer.def_abstract_eval
def _layer_shape(x, *, path, layer):
  w = jax.ShapeDtypeStruct(layer.kernel_shape, x.dtype)
  y = jax.eval_shape(
    products.rebuilt(layer).function, jax.ShapeDtypeStruct(x.shape, x.dtype), w
  )
  return jax.core.ShapedArray(y.shape, y.dtype)


def _map_layer(operands, axes, **params):
  """Examples of a batch of one that are mapped are examples of one batch."""
  (x,), (axis,) = operands, axes
  x = jax.numpy.moveaxis(x, axis, 0)
  y = _layer.bind(x.reshape(-1, *x.shape[2:]), **params)
  return y.reshape(x.shape[0], x.shape[1], *y.shape[1:]), 0


batching.primitive_batchers[_layer] = _map_layer


def _marked(layer, x, product, element):
  return _layer.bind(x, path=layer.layer.path, layer=layer.layer)


def _add_layer(deployment, graph: 'Graph', equation, given):
  """Adds a layer: its input rounded, its weights decoded, and their product."""
  from fliqs_jax.exporting.onnx_graph import Tensor, convolution

  (x,), (aval,) = given, [atom.aval for atom in equation.invars]
  layer = deployment.layers[equation.params['path']]
  x = graph.broadcast(x, aval.shape)
  params = dict(layer.layer.arguments)
  shape = tuple(equation.outvars[0].aval.shape)
  if layer.layer.kind == 'conv':
    numbers = params['dimension_numbers']
    params['padding'] = _padding(params, aval.shape, layer.codes.shape)
    order = numbers.rhs_spec
    w = _decoded(graph, layer, layer.codes.transpose(order), 0)
    # Rounded in the order of ONNX's axes, so that nothing stands before the product.
    x = _rounded(graph, layer, graph.transposed(x, numbers.lhs_spec))
    y = convolution(graph, params, x, w, in_onnx_order=True)
    return [Tensor(y, shape)]
  (x_axes, w_axes), (x_batch, _) = params['dimension_numbers']
  first, last = len(aval.shape) - len(x_axes), len(w_axes)
  if (
    x_batch
    or x_axes != tuple(range(first, len(aval.shape)))
    or w_axes != tuple(range(last))
  ):
    raise ConfigError(
      f'layer {layer.layer.path!r} contracts axes {x_axes} and {w_axes}: ONNX export '
      'takes the last of its input and the first of its weights'
    )
  contracted = int(np.prod(layer.codes.shape[:last]))
  w = _decoded(graph, layer, layer.codes.reshape(contracted, -1), 1)
  x = graph.reshaped(x, (*aval.shape[:first], contracted))
  y = graph.node('MatMul', [_rounded(graph, layer, x), w])
  return [Tensor(graph.reshaped(y, shape), shape)]


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


def _rounded(graph, layer, x):
  """Adds the rounding of a layer's input."""
  from onnx import TensorProto

  format = find_format(layer.activations)
  if format.name == 'float32':
    return x
  if format.name == 'bf16':
    x = graph.node('Cast', [x], to=TensorProto.BFLOAT16)
    return graph.node('Cast', [x], to=TensorProto.FLOAT)
  scale = np.float32(layer.activation_scale)
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
  return graph.node('DequantizeLinear', [codes, scale, zero])


def _decoded(graph, layer, codes, axis):
  """Adds the codes of a layer's weights and their decoding."""
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
