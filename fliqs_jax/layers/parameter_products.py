"""Products of parameters in a traced network: found, and computed in another way.

A network may multiply by a parameter of its own without a layer of Flax, by
`lax.dot_general`, `lax.conv_general_dilated`, `jnp.einsum`, `jnp.matmul`, `@`, or
`nn.Embed.attend`. Whatever the call, in the network's jaxpr it is one of two
operations, of which one operand follows from parameters alone.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import math
import os
from typing import Any, NamedTuple

import flax
import jax
from jax import lax
from jax.extend import core
import jax.numpy as jnp

from fliqs_jax.layers import products
from fliqs_jax.layers.layer import Layer, describe, join_path
from fliqs_jax.numerics.products import Product

OPERATOR = 'product'  # in the place of a quantized operator's name

Path = tuple[str, ...]


class Parameters(NamedTuple):
  """Parameters that a value follows from, where these and constants are all."""

  size: int = 0  # of the largest parameter
  path: Path = ()  # of it; empty where the value is a constant
  stack: tuple[int, ...] = ()  # lengths of the scans around it that slice it
  others: frozenset[Path] = frozenset()  # paths of the other parameters


Origin = Parameters | None  # None where a value depends on anything else
CONSTANT = Parameters()

# (state, path, product, x, w) -> the product and the new state, a dict by path.
Compute = Callable[[Any, Path, Product, jax.Array, jax.Array], tuple[jax.Array, Any]]


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


class _Operands(NamedTuple):
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
  found: list[ParameterProduct] = []
  _find(jaxpr, origins, found.append)
  return tuple(found)


def find_of_activations(
  jaxpr: Any, origins: Sequence[Origin]
) -> tuple[ActivationProduct, ...]:
  """Returns the products of two activations, each call of one, in order.

  Args:
    jaxpr: as in `find`.
    origins: as in `find`.
  """
  found: list[ActivationProduct] = []
  _find(jaxpr, origins, lambda _: None, found.append)
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


def _find(
  jaxpr,
  origins,
  add,
  add_of_activations=lambda _: None,
  calls=1,
  is_open=True,
):
  """Adds the products of a jaxpr; returns the origins of its results."""
  jaxpr = getattr(jaxpr, 'jaxpr', jaxpr)
  known = dict.fromkeys(jaxpr.constvars, CONSTANT) | dict(zip(jaxpr.invars, origins))
  for equation in jaxpr.eqns:
    given, name = _read_origins(equation, known), equation.primitive.name
    results = [
      _find(
        inner,
        inner_origins,
        add,
        add_of_activations,
        calls * times,
        is_open and name in _REBUILT,
      )
      for inner, inner_origins, times in _inner(equation, given)
    ]
    if operands := _operands(equation, given):
      _, path, stack, others = given[operands.w]
      x, w = (equation.invars[i].aval for i in (operands.x, operands.w))
      w = jax.ShapeDtypeStruct([w.shape[a] for a in operands.w_axes], w.dtype)
      layer = describe(join_path(path), OPERATOR, operands.product, x, w)
      layer = layer._replace(macs=calls * layer.macs, calls=calls)
      add(ParameterProduct(path, layer, is_open, stack, others))
    elif name == 'dot_general' and given == [None, None]:
      add_of_activations(_of_activations(equation))
    known |= zip(equation.outvars, _result_origins(equation, given, results))
  return [_origin(atom, known) for atom in jaxpr.outvars]


def evaluate(
  jaxpr: Any,
  consts: Sequence[Any],
  origins: Sequence[Origin],
  args: Sequence[Any],
  replaced: frozenset[Path],
  compute: Compute,
  state: Any,
) -> tuple[list[Any], Any]:
  """Evaluates a jaxpr, in which some products of parameters are computed by a function.

  Args:
    jaxpr: the jaxpr, without its constants.
    consts: its constants.
    origins: of the arguments.
    args: the arguments.
    replaced: the parameters whose products are computed by `compute`.
    compute: (state, path, product, x, w) -> (y, state).
    state: trees of arrays by the path of their parameter; where scans slice that, their
      leading axes are those of the elements.

  Returns:
    The results, and the new state.
  """
  known = dict.fromkeys(jaxpr.constvars, CONSTANT) | dict(zip(jaxpr.invars, origins))
  values = dict(zip(jaxpr.constvars, consts)) | dict(zip(jaxpr.invars, args))
  uncast: dict[Any, Any] = {}  # a variable that is another in lower precision

  def read(atom):
    return atom.val if isinstance(atom, core.Literal) else values[atom]

  for equation in jaxpr.eqns:
    given, inputs = _read_origins(equation, known), list(map(read, equation.invars))
    operands = _operands(equation, given)
    if operands and given[operands.w].path in replaced:
      source = equation.invars[operands.w]
      w = values[uncast[source]] if source in uncast else inputs[operands.w]
      w = jnp.transpose(w, operands.w_axes)
      y, state = compute(
        state, given[operands.w].path, operands.product, inputs[operands.x], w
      )
      y = jnp.transpose(y, operands.y_axes)
      outputs = [y.astype(equation.outvars[0].aval.dtype)]
    elif equation.primitive.name in _REBUILT and _contains(equation, given, replaced):
      outputs, state = _REBUILT[equation.primitive.name](
        equation, given, inputs, replaced, compute, state
      )
    else:
      outputs = bind(jaxpr, equation, inputs)
    if _lowers_precision(equation):
      uncast[equation.outvars[0]] = equation.invars[0]
    values |= zip(equation.outvars, outputs)
    results = [
      _find(inner, inner_origins, lambda _: None)
      for inner, inner_origins, _ in _inner(equation, given)
    ]
    known |= zip(equation.outvars, _result_origins(equation, given, results))
  return list(map(read, jaxpr.outvars)), state


def weights(
  jaxpr: Any, consts: Sequence[Any], origins: Sequence[Origin], args: Sequence[Any]
) -> dict[Path, list[jax.Array | None]]:
  """Returns what products of parameters multiply by, each call of one, in order.

  That follows from parameters alone, whatever lies between: a transposition, say. Where
  scans slice a parameter, the weights of their elements are stacked. None where other
  loops compute the weights.

  Args:
    jaxpr: of the network, without its constants.
    consts: its constants.
    origins: of its arguments.
    args: arrays; None for what follows from no parameter.
  """
  found: dict[Path, list[jax.Array | None]] = {}
  _add_weights(jaxpr, consts, origins, args, found)
  return found


def _add_weights(jaxpr, consts, origins, args, found):
  known = dict.fromkeys(jaxpr.constvars, CONSTANT) | dict(zip(jaxpr.invars, origins))
  values = dict(zip(jaxpr.constvars, consts)) | dict(zip(jaxpr.invars, args))
  makers: dict[Any, Any] = {}  # equations that follow from parameters alone
  uncast: dict[Any, Any] = {}  # as in `evaluate`

  def read(atom):
    """Returns a value, computed where it is asked for; None where it is not known."""
    if isinstance(atom, core.Literal):
      return atom.val
    if atom not in values:
      values[atom] = None
      if maker := makers.get(atom):
        inputs = list(map(read, maker.invars))
        if all(value is not None for value in inputs):
          values.update(zip(maker.outvars, bind(jaxpr, maker, inputs)))
    return values[atom]

  for equation in jaxpr.eqns:
    given = _read_origins(equation, known)
    if operands := _operands(equation, given):
      source = equation.invars[operands.w]
      w = read(uncast.get(source, source))
      w = None if w is None else jnp.transpose(w, operands.w_axes)
      found.setdefault(given[operands.w].path, []).append(w)
    results = []
    for inner, inner_origins, _ in _inner(equation, given):
      inside: list[ParameterProduct] = []
      results.append(_find(inner, inner_origins, inside.append))
      if inside:
        inputs = list(map(read, equation.invars))
        of_inner = _inner_weights(equation, inner, inner_origins, inputs)
        for path, calls in of_inner.items():
          found.setdefault(path, []).extend(calls)
    if None not in given:
      makers |= dict.fromkeys(equation.outvars, equation)
    if _lowers_precision(equation):
      uncast[equation.outvars[0]] = equation.invars[0]
    known |= zip(equation.outvars, _result_origins(equation, given, results))


def _inner_weights(equation, inner, origins, inputs):
  """Returns the weights of the products in a jaxpr of an equation."""
  consts, name = getattr(inner, 'consts', ()), equation.primitive.name
  inner = getattr(inner, 'jaxpr', inner)
  inputs = inputs[len(inputs) - len(origins) :]  # without the index of a branch
  if name != 'scan':
    known = [None] * len(inputs) if name == 'while' else inputs
    return weights(inner, consts, origins, known)
  first = equation.params['num_consts']
  last = first + equation.params['num_carry']
  elements = []
  for index in range(equation.params['length']):
    slices = [None if a is None else a[index] for a in inputs[last:]]
    known = [*inputs[:first], *[None] * (last - first), *slices]
    elements.append(weights(inner, consts, origins, known))
  sliced = {origin.path for origin in origins[last:] if origin}
  found = {}
  for path in elements[0]:
    calls = zip(*(element[path] for element in elements))
    found[path] = [
      jnp.stack(turns) if path in sliced and turns[0] is not None else turns[0]
      for turns in calls
    ]
  return found


def bind(jaxpr: Any, equation: Any, inputs: Sequence[Any]) -> list[Any]:
  """Returns the results of an equation of a jaxpr, whatever holds jaxprs itself.

  Args:
    jaxpr: the jaxpr that has the equation.
    equation: the equation.
    inputs: its operands.
  """
  places = {
    atom: value
    for atom, value in zip(equation.invars, inputs)
    if not isinstance(atom, core.Literal)
  }
  alone = jaxpr.replace(
    constvars=[],
    invars=list(places),
    outvars=equation.outvars,
    eqns=[equation],
  )
  return core.jaxpr_as_fun(core.ClosedJaxpr(alone, []))(*places.values())


def _lowers_precision(equation):
  """Returns whether an equation casts, as `promote_dtype` does before a product."""
  (x, *_), (y, *_) = equation.invars or [None], equation.outvars or [None]
  return equation.primitive.name == 'convert_element_type' and all(
    jnp.issubdtype(atom.aval.dtype, jnp.floating) and not isinstance(atom, core.Literal)
    for atom in (x, y)
  )


# Origins


def _origin(atom, known):
  return CONSTANT if isinstance(atom, core.Literal) else known[atom]


def _read_origins(equation, known):
  return [_origin(atom, known) for atom in equation.invars]


def _mixed(origins):
  if None in origins:
    return None
  largest = max(origins, key=lambda origin: origin[:2], default=CONSTANT)
  paths = {path for origin in origins for path in (origin.path, *origin.others)}
  return largest._replace(others=frozenset(paths - {largest.path, ()}))


def _result_origins(equation, given, inner):
  """Returns the origins of an equation's results; a product is nobody's parameter.

  Args:
    equation: the equation.
    given: the origins of its operands.
    inner: those of the results of each jaxpr in it.
  """
  if inner:
    results = [_mixed(origins) for origins in zip(*inner)]
    return _stacked(results, given) if equation.primitive.name == 'scan' else results
  is_product = equation.primitive.name in _PRODUCTS
  is_constant = all(origin == CONSTANT for origin in given)
  origin = None if is_product and not is_constant else _mixed(given)
  return [origin] * len(equation.outvars)


def _stacked(origins, given):
  """Returns origins of a scan's results: what it has sliced is whole again."""
  stacks = {origin.path: origin.stack for origin in given if origin}
  return [
    origin._replace(stack=stacks.get(origin.path, ())) if origin else None
    for origin in origins
  ]


def _sliced(origins, length):
  """Returns the origins of the slices that a scan takes."""
  return [
    origin._replace(stack=(*origin.stack, length)) if origin and origin.path else origin
    for origin in origins
  ]


def _inner(equation, given) -> Iterator[tuple[Any, list[Origin], int]]:
  """Yields the jaxprs in an equation, the origins of their arguments, their runs."""
  name, params = equation.primitive.name, equation.params
  if name == 'scan':
    first = params['num_consts']
    last = first + params['num_carry']
    slices = _sliced(given[last:], params['length'])
    carried = _settled(
      lambda carry: _find(
        params['jaxpr'], [*given[:first], *carry, *slices], lambda _: None
      )[: last - first],
      given[first:last],
    )
    yield params['jaxpr'], [*given[:first], *carried, *slices], params['length']
  elif name == 'while':
    num_tested, num_consts = params['cond_nconsts'], params['body_nconsts']
    consts, carry = given[num_tested:][:num_consts], given[num_tested + num_consts :]
    body = params['body_jaxpr']
    carry = _settled(lambda c: _find(body, [*consts, *c], lambda _: None), carry)
    yield body, [*consts, *carry], 1
  elif name == 'cond':
    for branch in params['branches']:
      yield branch, given[1:], 1
  else:
    for value in params.values():
      jaxpr = getattr(value, 'jaxpr', value)
      if hasattr(jaxpr, 'eqns') and len(jaxpr.invars) == len(given):
        yield value, given, 1
        return


def _settled(step, carry):
  """Returns the origins of a loop's carry, which each turn may only lose."""
  while True:
    new = [_mixed([a, b]) for a, b in zip(carry, step(carry))]
    if new == list(carry):
      return new
    carry = new


# Products

_PRODUCTS = ('dot_general', 'conv_general_dilated')


def _operands(equation, given) -> _Operands | None:
  """Returns the operands of a product by a parameter; None for any other equation."""
  name = equation.primitive.name
  if name not in _PRODUCTS:
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
  return _Operands(product, 1 - w, w, w_axes, tuple(y_axes))


def _convolution(equation):
  names = (
    'window_strides', 'padding', 'lhs_dilation', 'rhs_dilation', 'dimension_numbers',
    'feature_group_count', 'precision',
  )  # fmt: skip
  x, w = (atom.aval for atom in equation.invars)
  arguments = {name: equation.params[name] for name in names}
  product = products.convolution(x, w, **arguments)
  axes = tuple(range(w.ndim))
  return _Operands(product, 0, 1, axes, axes)


def _contains(equation, given, replaced):
  found: list[ParameterProduct] = []
  for jaxpr, origins, _ in _inner(equation, given):
    _find(jaxpr, origins, found.append)
  return any(product.path in replaced for product in found)


# Operations that hold jaxprs, rebuilt around what is evaluated anew


def _rebuild_jit(equation, given, inputs, replaced, compute, state):
  closed = equation.params['jaxpr']
  return evaluate(closed.jaxpr, closed.consts, given, inputs, replaced, compute, state)


def _rebuild_checkpoint(equation, given, inputs, replaced, compute, state):
  params = equation.params

  def body(state, *inputs):
    return evaluate(params['jaxpr'], (), given, inputs, replaced, compute, state)

  body = jax.checkpoint(
    body, prevent_cse=params['prevent_cse'], policy=params['policy']
  )
  return body(state, *inputs)


def _rebuild_scan(equation, given, inputs, replaced, compute, state):
  params, closed = equation.params, equation.params['jaxpr']
  ((_, origins, _),) = _inner(equation, given)
  first = params['num_consts']
  last = first + params['num_carry']
  paths = {origin.path for origin in origins[last:] if origin}
  shared, sliced = {}, {}
  for path, value in state.items():
    of_elements = jnp.shape(jax.tree.leaves(value)[0])[:1] == (params['length'],)
    (sliced if of_elements and path in paths else shared)[path] = value

  def body(carry, slices):
    (carry, shared), (slices, sliced) = carry, slices
    args = [*inputs[:first], *carry, *slices]
    outputs, new = evaluate(
      closed.jaxpr, closed.consts, origins, args, replaced, compute, shared | sliced
    )
    carried, stacked = outputs[: last - first], outputs[last - first :]
    return (carried, {p: new[p] for p in shared}), (
      stacked,
      {p: new[p] for p in sliced},
    )

  (carry, shared), (stacked, sliced) = lax.scan(
    body,
    (inputs[first:last], shared),
    (inputs[last:], sliced),
    length=params['length'],
    reverse=params['reverse'],
    unroll=params['unroll'],
  )
  return [*carry, *stacked], shared | sliced


def _rebuild_cond(equation, given, inputs, replaced, compute, state):
  def branch(closed):
    return lambda state, *inputs: evaluate(
      closed.jaxpr, closed.consts, given[1:], inputs, replaced, compute, state
    )

  branches = list(map(branch, equation.params['branches']))
  return lax.switch(inputs[0], branches, state, *inputs[1:])


_REBUILT = {
  'jit': _rebuild_jit,
  'pjit': _rebuild_jit,
  'checkpoint': _rebuild_checkpoint,
  'remat2': _rebuild_checkpoint,
  'scan': _rebuild_scan,
  'cond': _rebuild_cond,
}
