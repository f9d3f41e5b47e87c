"""Products in a traced network: those of parameters, and those of activations alone.

A network may multiply by a parameter of its own without a layer of Flax, by
`lax.dot_general`, `lax.conv_general_dilated`, `jnp.einsum`, `jnp.matmul`, `@`, or
`nn.Embed.attend`. Whatever the call, in the network's jaxpr it is one of two
operations, of which one operand follows from parameters alone.
"""

from collections.abc import Iterable, Mapping, Sequence
import math
import os
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp

from fliqs_jax.layers import products
from fliqs_jax.layers.layer import Layer, describe, join_path
from fliqs_jax.layers.origins import CONSTANT, PRODUCTS, Origin, Path, propagate
from fliqs_jax.numerics.products import Product

OPERATOR = 'product'  # in the place of a quantized operator's name

REBUILT = frozenset({'jit', 'pjit', 'checkpoint', 'remat2', 'scan', 'cond'})
"""Operations within which `product_evaluation` can compute a product in another way."""


class ParameterProduct(NamedTuple):
  """A product by a parameter, as it stands in a jaxpr."""

  path: Path  # of the parameter
  layer: Layer
  is_open: bool  # whether it can be computed in another way
  stack: tuple[int, ...]  # lengths of the scans around it that slice the parameter
  others: frozenset[Path]  # other parameters that make the weights, as parts of them


class ActivationProduct(NamedTuple):
  """A product of two values that follow from inputs, as it stands in a jaxpr."""

  place: str  # in the user's code: the function, the file and the line
  scopes: str  # named, around it
  shapes: tuple[tuple[int, ...], tuple[int, ...]]


class Operands(NamedTuple):
  """The operands of an equation, in the order (x, w) that Flax's layers have."""

  product: Product
  x: int  # its place among the equation's operands
  w: int
  w_axes: tuple[int, ...]  # in which the axes of the weights are taken
  y_axes: tuple[int, ...]  # in which those of the result are given back


def find(jaxpr: Any, origins: Sequence[Origin]) -> tuple[ParameterProduct, ...]:
  """Returns the products of parameters, each call of one, in order.

  What a loop of unknown length holds counts once, and cannot be computed otherwise.

  Args:
    jaxpr: of the network, from `jax.make_jaxpr`.
    origins: of its arguments.
  """
  found: list[ParameterProduct | None] = []
  propagate(jaxpr, origins, lambda *at: found.append(_product(*at)))
  return tuple(product for product in found if product)


def find_of_activations(
  jaxpr: Any, origins: Sequence[Origin]
) -> tuple[ActivationProduct, ...]:
  """Returns the products of two activations, each call of one, in order.

  Args:
    jaxpr: as in `find`.
    origins: as in `find`.
  """
  found: list[ActivationProduct] = []

  def visit(equation, given, runs, around):
    if equation.primitive.name == 'dot_general' and given == [None, None]:
      found.append(_of_activations(equation))

  propagate(jaxpr, origins, visit)
  return tuple(found)


def layers(
  found: Sequence[ParameterProduct], sizes: Mapping[Path, int]
) -> dict[Path, Layer]:
  """Returns a layer for each parameter, whose multiply-accumulates add up.

  Args:
    found: from `find`.
    sizes: of the parameters.
  """
  merged: dict[Path, Layer] = {}
  for product in found:
    path, layer = product.path, product.layer
    if previous := merged.get(path):
      merged[path] = previous._replace(
        macs=previous.macs + layer.macs, calls=previous.calls + layer.calls
      )
    else:
      params = sum(sizes[name] for name in {path, *product.others})
      kernels = params // math.prod(layer.kernel_shape)
      merged[path] = layer._replace(params=params, kernels=max(kernels, 1))
  return merged


def outside_of(
  found: Sequence[ParameterProduct], modules: Iterable[Path], sizes: Mapping[Path, int]
) -> dict[Path, Layer]:
  """Returns a layer for each parameter whose products can be searched by themselves.

  Args:
    found: from `find`.
    modules: the paths of layers of Flax, searched or left alone, whose products these
      are.
    sizes: of the parameters.
  """
  modules = set(modules)
  bare = [
    product for product in found if product.is_open and product.path[:-1] not in modules
  ]
  return layers(bare, sizes)


def _product(equation, given, runs, around):
  """Returns the product by a parameter that an equation is; None for any other."""
  if not (operands := find_operands(equation, given)):
    return None
  _, path, stack, others = given[operands.w]
  x, w = (equation.invars[i].aval for i in (operands.x, operands.w))
  w = jax.ShapeDtypeStruct([w.shape[a] for a in operands.w_axes], w.dtype)
  layer = describe(join_path(path), OPERATOR, operands.product, x, w)
  layer = layer._replace(macs=runs * layer.macs, calls=runs)
  return ParameterProduct(path, layer, REBUILT.issuperset(around), stack, others)


def find_operands(equation: Any, given: Sequence[Origin]) -> Operands | None:
  """Returns the operands of a product by a parameter; None for any other equation.

  Args:
    equation: of a jaxpr.
    given: the origins of its operands.
  """
  name = equation.primitive.name
  if name not in PRODUCTS:
    return None
  # Of two parameters the second is the weights, as of a layer on learned inputs.
  w = next((i for i in (1, 0) if given[i] is not None and given[i].path), None)
  if w is None or given[1 - w] == CONSTANT:
    return None
  dtypes = [atom.aval.dtype for atom in equation.invars]
  if not all(jnp.issubdtype(dtype, jnp.floating) for dtype in dtypes):
    return None
  if name == 'dot_general':
    return _dot_general(equation, w)
  if w == 0 or equation.params['batch_group_count'] != 1:
    return None
  return _convolution(equation)


def _of_activations(equation):
  source = equation.source_info
  frames = source.traceback.frames if source.traceback else ()
  own = (f for f in frames if not f.file_name.startswith(_LIBRARIES))
  place = next((f'{f.function_name} in {f.file_name}:{f.line_num}' for f in own), '')
  shapes = tuple(atom.aval.shape for atom in equation.invars)
  return ActivationProduct(place, str(source.name_stack), shapes)


# The folders of packages whose code is not the user's, this one among them.
_LIBRARIES = tuple(
  os.path.dirname(path) + os.sep
  for path in (jax.__file__, flax.__file__, os.path.dirname(__file__))
)


def _dot_general(equation, w):
  contracting, batch = equation.params['dimension_numbers']
  (x_in, w_in), (x_batch, w_batch) = (
    (axes[1 - w], axes[w]) for axes in (contracting, batch)
  )
  if not w_in:  # an outer product
    return None
  x_aval, w_aval = (equation.invars[i].aval for i in (1 - w, w))
  own = [a for a in range(w_aval.ndim) if a not in (*w_in, *w_batch)]
  w_axes = tuple(range(w_aval.ndim))
  if sorted((*w_batch, *own)) != [*w_batch, *own]:  # of the result, not of the weights
    w_axes = (*w_batch, *own, *w_in)
  w_in, w_batch = (tuple(w_axes.index(a) for a in axes) for axes in (w_in, w_batch))
  shape = jax.ShapeDtypeStruct([w_aval.shape[a] for a in w_axes], w_aval.dtype)
  product = products.dot_general(
    x_aval,
    shape,
    ((tuple(x_in), w_in), (tuple(x_batch), w_batch)),
    equation.params['precision'],
  )
  y_ndim, num_batch = equation.outvars[0].aval.ndim, len(w_batch)
  y_axes = list(range(y_ndim))
  if w == 0:  # whose axes come before those of x
    first = y_ndim - len(own)
    y_axes = [*y_axes[:num_batch], *y_axes[first:], *y_axes[num_batch:first]]
  return Operands(product, 1 - w, w, w_axes, tuple(y_axes))


def _convolution(equation):
  names = (
    'window_strides', 'padding', 'lhs_dilation', 'rhs_dilation', 'dimension_numbers',
    'feature_group_count', 'precision',
  )  # fmt: skip
  x, w = (atom.aval for atom in equation.invars)
  arguments = {name: equation.params[name] for name in names}
  product = products.convolution(x, w, **arguments)
  axes = tuple(range(w.ndim))
  return Operands(product, 0, 1, axes, axes)
