"""Rules of products and convolutions: (graph, equation, names) -> name."""

from collections.abc import Sequence
import string
from typing import Any

import numpy as np

from fliqs_jax.errors import ConfigError
from fliqs_jax.exporting.onnx_graph.graph import Graph
from fliqs_jax.exporting.onnx_graph.shapes import cropped, spread


def dot_general(
  graph: Graph, dimension_numbers: Any, ndims: tuple[int, int], names: Sequence[str]
) -> str:
  """Adds a product, and returns its name.

  Args:
    graph: grows.
    dimension_numbers: of `lax.dot_general`.
    ndims: the numbers of axes of the operands.
    names: of the operands.
  """
  contract, batch = dimension_numbers
  letters = iter(string.ascii_lowercase)
  axes = [[None] * ndim for ndim in ndims]
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
  equation = f'{"".join(axes[0])},{"".join(axes[1])}->{"".join(shared + own)}'
  return graph.node('Einsum', names, equation=equation)


def convolution(
  graph: Graph,
  params: Any,
  x: str,
  w: str,
  x_shape: tuple[Any, ...],
  in_onnx_order: bool = False,
) -> str:
  """Adds a convolution, and returns its name.

  Args:
    graph: grows.
    params: of `lax.conv_general_dilated`, padding as pairs.
    x: the input.
    w: the weights.
    x_shape: of the input, in the order of `params`.
    in_onnx_order: whether the axes of both are in ONNX's order already.
  """
  numbers, padding = params['dimension_numbers'], params['padding']
  if params.get('batch_group_count', 1) != 1:
    raise ConfigError('the network convolves in groups of examples: no ONNX rule')
  if not in_onnx_order:
    x = graph.transposed(x, numbers.lhs_spec)
    w = graph.transposed(w, numbers.rhs_spec)
  shape = [x_shape[axis] for axis in numbers.lhs_spec]
  for axis, step in enumerate(params.get('lhs_dilation') or (), 2):
    if step != 1:
      x = spread(graph, x, shape, axis, step, graph.constant(np.float32(0)))
      shape[axis] = (shape[axis] - 1) * step + 1
  x = cropped(graph, x, [(0, 0), (0, 0), *padding])
  padding = [(max(low, 0), max(high, 0)) for low, high in padding]
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
  return convolution(graph, equation.params, *names, equation.invars[0].aval.shape)


def _dot_general(graph, equation, names):
  ndims = tuple(atom.aval.ndim for atom in equation.invars)
  return dot_general(graph, equation.params['dimension_numbers'], ndims, names)


RULES = {'conv_general_dilated': _convolution, 'dot_general': _dot_general}
