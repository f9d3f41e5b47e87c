"""Origins: the parameters that the values of a traced network follow from.

A value has an origin where parameters and constants are all that it depends on. What
follows from an input has none.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from jax.extend import core

Path = tuple[str, ...]


class Parameters(NamedTuple):
  """Parameters that a value follows from, where these and constants are all."""

  size: int = 0  # of the largest parameter
  path: Path = ()  # of it; empty where the value is a constant
  stack: tuple[int, ...] = ()  # lengths of the scans around it that slice it
  others: frozenset[Path] = frozenset()  # paths of the other parameters


Origin = Parameters | None  # None where a value depends on anything else
CONSTANT = Parameters()

PRODUCTS = ('dot_general', 'conv_general_dilated')

# (equation, origins of its operands, its runs, names of the equations around it)
Visit = Callable[[Any, list[Origin], int, tuple[str, ...]], None]


def visit_nothing(*_: Any) -> None:
  """The `Visit` of who asks for origins alone."""


def propagate(
  jaxpr: Any,
  origins: Sequence[Origin],
  visit: Visit = visit_nothing,
  runs: int = 1,
  around: tuple[str, ...] = (),
) -> list[Origin]:
  """Returns the origins of a jaxpr's results.

  Args:
    jaxpr: closed or open.
    origins: of its arguments.
    visit: called with each equation, in order, those within others before these. What
      a loop of unknown length holds counts as run once.
    runs: how often the jaxpr itself is run.
    around: names of the operations that hold it.
  """
  jaxpr = getattr(jaxpr, 'jaxpr', jaxpr)
  known = first_origins(jaxpr, origins)
  for equation in jaxpr.eqns:
    given, holders = read_origins(equation, known), (*around, equation.primitive.name)
    results = [
      propagate(inner, inner_origins, visit, runs * times, holders)
      for inner, inner_origins, times in inner_jaxprs(equation, given)
    ]
    visit(equation, given, runs, around)
    known |= zip(equation.outvars, result_origins(equation, given, results))
  return [_origin(atom, known) for atom in jaxpr.outvars]


def first_origins(jaxpr: Any, origins: Sequence[Origin]) -> dict[Any, Origin]:
  """Returns the origins of an open jaxpr's constants and arguments, by variable."""
  return dict.fromkeys(jaxpr.constvars, CONSTANT) | dict(zip(jaxpr.invars, origins))


def _origin(atom, known):
  return CONSTANT if isinstance(atom, core.Literal) else known[atom]


def read_origins(equation: Any, known: dict[Any, Origin]) -> list[Origin]:
  """Returns the origins of an equation's operands.

  Args:
    equation: of a jaxpr.
    known: the origins of the variables before it.
  """
  return [_origin(atom, known) for atom in equation.invars]


def _mixed(origins):
  if None in origins:
    return None
  largest = max(origins, key=lambda origin: origin[:2], default=CONSTANT)
  paths = {path for origin in origins for path in (origin.path, *origin.others)}
  return largest._replace(others=frozenset(paths - {largest.path, ()}))


def result_origins(
  equation: Any, given: Sequence[Origin], inner: Sequence[list[Origin]]
) -> list[Origin]:
  """Returns the origins of an equation's results; a product is nobody's parameter.

  Args:
    equation: the equation.
    given: the origins of its operands.
    inner: those of the results of each jaxpr in it.
  """
  if inner:
    results = [_mixed(origins) for origins in zip(*inner)]
    return _stacked(results, given) if equation.primitive.name == 'scan' else results
  is_product = equation.primitive.name in PRODUCTS
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


def inner_jaxprs(
  equation: Any, given: list[Origin]
) -> Iterator[tuple[Any, list[Origin], int]]:
  """Yields the jaxprs in an equation, the origins of their arguments, their runs."""
  name, params = equation.primitive.name, equation.params
  if name == 'scan':
    first = params['num_consts']
    last = first + params['num_carry']
    slices = _sliced(given[last:], params['length'])
    carried = _settled(
      lambda carry: propagate(params['jaxpr'], [*given[:first], *carry, *slices])[
        : last - first
      ],
      given[first:last],
    )
    yield params['jaxpr'], [*given[:first], *carried, *slices], params['length']
  elif name == 'while':
    num_tested, num_consts = params['cond_nconsts'], params['body_nconsts']
    consts, carry = given[num_tested:][:num_consts], given[num_tested + num_consts :]
    body = params['body_jaxpr']
    carry = _settled(lambda c: propagate(body, [*consts, *c]), carry)
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
