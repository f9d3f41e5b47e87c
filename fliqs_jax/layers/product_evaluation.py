"""Values in a traced network: products of parameters computed in another way, and what
they multiply by.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax
from jax.extend import core
import jax.numpy as jnp

from fliqs_jax.layers.origins import (
  Origin,
  Path,
  first_origins,
  inner_jaxprs,
  propagate,
  read_origins,
  result_origins,
)
from fliqs_jax.layers.parameter_products import find, find_operands
from fliqs_jax.numerics.products import Product

# (state, path, product, x, w) -> the product and the new state, a dict by path.
Compute = Callable[[Any, Path, Product, jax.Array, jax.Array], tuple[jax.Array, Any]]


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
  known = first_origins(jaxpr, origins)
  values = dict(zip(jaxpr.constvars, consts)) | dict(zip(jaxpr.invars, args))
  uncast: dict[Any, Any] = {}  # a variable that is another in lower precision

  def read(atom):
    return atom.val if isinstance(atom, core.Literal) else values[atom]

  for equation in jaxpr.eqns:
    given, inputs = read_origins(equation, known), list(map(read, equation.invars))
    operands = find_operands(equation, given)
    if operands and given[operands.w].path in replaced:
      source = equation.invars[operands.w]
      w = values[uncast[source]] if source in uncast else inputs[operands.w]
      w = jnp.transpose(w, operands.w_axes)
      y, state = compute(
        state, given[operands.w].path, operands.product, inputs[operands.x], w
      )
      y = jnp.transpose(y, operands.y_axes)
      outputs = [y.astype(equation.outvars[0].aval.dtype)]
    elif equation.primitive.name in REBUILDERS and _contains(equation, given, replaced):
      outputs, state = REBUILDERS[equation.primitive.name](
        equation, given, inputs, replaced, compute, state
      )
    else:
      outputs = bind(jaxpr, equation, inputs)
    if _lowers_precision(equation):
      uncast[equation.outvars[0]] = equation.invars[0]
    values |= zip(equation.outvars, outputs)
    results = [
      propagate(inner, inner_origins)
      for inner, inner_origins, _ in inner_jaxprs(equation, given)
    ]
    known |= zip(equation.outvars, result_origins(equation, given, results))
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
  known = first_origins(jaxpr, origins)
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
    given = read_origins(equation, known)
    if operands := find_operands(equation, given):
      source = equation.invars[operands.w]
      w = read(uncast.get(source, source))
      w = None if w is None else jnp.transpose(w, operands.w_axes)
      found.setdefault(given[operands.w].path, []).append(w)
    results = []
    for inner, inner_origins, _ in inner_jaxprs(equation, given):
      results.append(propagate(inner, inner_origins))
      if find(inner, inner_origins):
        inputs = list(map(read, equation.invars))
        of_inner = _inner_weights(equation, inner, inner_origins, inputs)
        for path, calls in of_inner.items():
          found.setdefault(path, []).extend(calls)
    if None not in given:
      makers |= dict.fromkeys(equation.outvars, equation)
    if _lowers_precision(equation):
      uncast[equation.outvars[0]] = equation.invars[0]
    known |= zip(equation.outvars, result_origins(equation, given, results))


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


def _contains(equation, given, replaced):
  return any(
    product.path in replaced
    for jaxpr, origins, _ in inner_jaxprs(equation, given)
    for product in find(jaxpr, origins)
  )


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
  ((_, origins, _),) = inner_jaxprs(equation, given)
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


REBUILDERS = {
  'jit': _rebuild_jit,
  'pjit': _rebuild_jit,
  'checkpoint': _rebuild_checkpoint,
  'remat2': _rebuild_checkpoint,
  'scan': _rebuild_scan,
  'cond': _rebuild_cond,
}
