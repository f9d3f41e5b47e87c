"""Architecture choices as data: sizes that are functions of decisions.

A network *declares* what can be decided about it by asking for each size:

    width = self.choose('stage2/width', options=(12, 16, 24), default=24)

With `standard` it gets the default, with `Fixed` what a search has found, both plain
integers. With `searched` it gets a `Table`, an integer for every option, builds itself
at the largest (`largest`) and tells its layers their sizes. Then `SearchSpace.bind`
gives each layer the chosen sizes, traced, and the layer masks its kernel
(`numerics.masking`). So a search step is compiled once for all architectures.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import itertools
import math
from typing import Any, ClassVar, NamedTuple, Protocol

from fliqs_jax.errors import ConfigError, not_among


class Decision(NamedTuple):
  """A choice of one size out of several."""

  name: str
  options: tuple[int, ...]
  default: int  # what the standard network has


@dataclasses.dataclass(frozen=True)
class Table:
  """A value for every combination of the options of some decisions.

  Attributes:
    decisions: those that the value depends on.
    values: for all combinations, the options of the last decision next to each other.
  """

  decisions: tuple[Decision, ...]
  values: tuple[Any, ...]

  def __mul__(self, other: 'Size') -> 'Size':
    return combine(lambda a, b: a * b, self, other)

  __rmul__ = __mul__

  def strides(self) -> dict[str, int]:
    """Returns how far apart the values of adjacent options are, by decision."""
    strides, stride = {}, len(self.values)
    for decision in self.decisions:
      stride //= len(decision.options)
      strides[decision.name] = stride
    return strides


Size = int | Table  # an integer is a size that nothing is decided about


class Choose(Protocol):
  """Answers for the sizes of a network whose architecture can be searched."""

  is_standard: bool  # the published network
  is_open: bool  # sizes are tables, left to a search

  def __call__(self, name: str, options: Sequence[int], default: int) -> Size:
    """Returns the size of that name."""


@dataclasses.dataclass(frozen=True)
class Standard:
  """Chooses the defaults: the network as it is published."""

  is_standard: ClassVar[bool] = True
  is_open: ClassVar[bool] = False

  def __call__(self, name: str, options: Sequence[int], default: int) -> int:
    """Returns the default."""
    del name, options
    return default


@dataclasses.dataclass(frozen=True)
class Searched:
  """Leaves each choice open, among the options and the default."""

  is_standard: ClassVar[bool] = False
  is_open: ClassVar[bool] = True

  def __call__(self, name: str, options: Sequence[int], default: int) -> Table:
    """Returns the table of the options."""
    options = tuple(sorted({*options, default}))
    return Table((Decision(name, options, default),), options)


@dataclasses.dataclass(frozen=True)
class Fixed:
  """Chooses what has been found.

  Attributes:
    choices: pairs of a decision's name and the size.
  """

  choices: tuple[tuple[str, int], ...]
  is_standard: ClassVar[bool] = False
  is_open: ClassVar[bool] = False

  def __call__(self, name: str, options: Sequence[int], default: int) -> int:
    """Returns the size of that name."""
    return dict(self.choices)[name]


standard = Standard()
searched = Searched()


def fix(decisions: Sequence[Decision], architecture: Mapping[str, int]) -> Choose:
  """Returns what chooses an architecture, the standard one where it is empty.

  Raises:
    ConfigError: where it is not one choice for exactly these decisions; one line.
  """
  if not architecture:
    return standard
  known = {decision.name: decision for decision in decisions}
  if not known:
    raise ConfigError('the network leaves nothing of its architecture to decide')
  for name in architecture:
    if name not in known:
      given = f'the architecture is for another space: it decides {name!r}'
      raise ConfigError(not_among(given, name, known, 'a decision of this network'))
  for name, decision in known.items():
    if name not in architecture:
      raise ConfigError(f'the architecture is for another space: it lacks {name!r}')
    if architecture[name] not in decision.options:
      raise ConfigError(
        f'the architecture has {name}={architecture[name]!r}: expected one of '
        f'{", ".join(map(str, decision.options))}'
      )
  return Fixed(tuple(sorted(architecture.items())))


def combine(function: Callable[..., Any], *sizes: Any) -> Any:
  """Returns a function of sizes, as a table over all decisions of these.

  Args:
    function: of one value of each.
    *sizes: tables, or any other values, which are constants.

  Returns:
    A table, or the function's plain value where no size is a table.
  """
  tables = [size for size in sizes if isinstance(size, Table)]
  decisions = tuple(dict.fromkeys(d for table in tables for d in table.decisions))
  if not decisions:
    return function(*sizes)
  columns = [_spread(size, decisions) for size in sizes]
  return Table(decisions, tuple(map(function, *columns)))


def _spread(size, decisions):
  """The values of a size for all combinations of the options of `decisions`."""
  combinations = math.prod(len(decision.options) for decision in decisions)
  if not isinstance(size, Table):
    return itertools.repeat(size, combinations)
  strides = size.strides()
  ranges = [
    [option * strides.get(decision.name, 0) for option in range(len(decision.options))]
    for decision in decisions
  ]
  return [size.values[sum(offsets)] for offsets in itertools.product(*ranges)]


def largest(size: Size) -> int:
  """Returns the size to allocate."""
  return max(size.values) if isinstance(size, Table) else size
