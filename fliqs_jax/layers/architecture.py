"""Architecture choices as data: sizes that are functions of decisions.

A network *declares* what can be decided about it by asking for each size:

    width = self.choose('stage2/width', options=(12, 16, 24), default=24)

With `standard` it gets the default, with `Fixed` what a search has found, both plain
integers. With `searched` it gets a `Table`, an integer for every option, builds itself
at the largest (`largest`) and tells its layers their sizes (`tell_sizes`). Then
`SearchSpace.bind` gives each layer the chosen sizes, traced, and the layer masks its
kernel: channels are a prefix of the largest's, kernels its centre. So a search step is
compiled once for all architectures.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import itertools
import math
from typing import Any, NamedTuple

from flax import linen as nn
import jax

from fliqs_jax.errors import not_among

FORMATS = 'formats'  # the collection in which a network finds what is decided
SIZES = 'sizes'  # its variables, each a `LayerSizes` or, of a gate, one of its sizes


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

# How a network asks for a size: (name, options, default) -> size.
Choose = Callable[[str, Sequence[int], int], Size]


class LayerSizes(NamedTuple):
  """The sizes of a layer, or of one operand's axes; None where it has no such axis."""

  inputs: Any = None  # channels
  outputs: Any = None  # channels
  kernel: Any = None  # extent in space, odd
  present: Any = None  # 1, or 0 where the layer is skipped


def standard(name: str, options: Sequence[int], default: int) -> int:
  """Chooses the default: the network as it is published."""
  del name, options
  return default


def searched(name: str, options: Sequence[int], default: int) -> Table:
  """Leaves the choice open, among the options and the default."""
  options = tuple(sorted({*options, default}))
  return Table((Decision(name, options, default),), options)


@dataclasses.dataclass(frozen=True)
class Fixed:
  """Chooses what has been found.

  Attributes:
    choices: pairs of a decision's name and the size.
  """

  choices: tuple[tuple[str, int], ...]

  def __call__(self, name: str, options: Sequence[int], default: int) -> int:
    """Returns the size of that name."""
    return dict(self.choices)[name]


def fix(decisions: Sequence[Decision], architecture: Mapping[str, int]) -> Choose:
  """Returns what chooses an architecture, the standard one where it is empty.

  Raises:
    ValueError: where it is not one choice for exactly these decisions; one line.
  """
  if not architecture:
    return standard
  known = {decision.name: decision for decision in decisions}
  if not known:
    raise ValueError('the network leaves nothing of its architecture to decide')
  for name in architecture:
    if name not in known:
      given = f'the architecture is for another space: it decides {name!r}'
      raise ValueError(not_among(given, name, known, 'a decision of this network'))
  for name, decision in known.items():
    if name not in architecture:
      raise ValueError(f'the architecture is for another space: it lacks {name!r}')
    if architecture[name] not in decision.options:
      raise ValueError(
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


class Gate(nn.Module):
  """Lets a block's residual through where the block is present, else nothing."""

  present: Size

  @nn.compact
  def __call__(self, y: jax.Array) -> jax.Array:
    """Returns `y`, or zeros of its shape."""
    if not self.has_variable(FORMATS, SIZES):
      return y
    return y * self.get_variable(FORMATS, SIZES).astype(y.dtype)


def gated(y: jax.Array, present: Size) -> jax.Array:
  """Returns a residual, gated where it is open whether its block is present.

  Called in the compact method of the block, beside whose layers it is discovered.
  """
  return Gate(present, name='gate')(y) if isinstance(present, Table) else y


def tell_sizes(layer: Any, **sizes: Size) -> Any:
  """Returns a layer's class whose quantized operator is told what is decided of it.

  Args:
    layer: a partial of a linen layer, with the hooks of `layers`.
    **sizes: fields of `LayerSizes`.

  Raises:
    ValueError: where sizes are to be searched and the layer has no hook.
  """
  if not any(isinstance(size, Table) for size in sizes.values()):
    return layer
  hooks = getattr(layer, 'keywords', {})
  for hook in ('conv_general_dilated_cls', 'dot_general_cls'):
    if hook in hooks:
      operator = functools.partial(hooks[hook], sizes=LayerSizes(**sizes))
      return functools.partial(layer, **{hook: operator})
  raise ValueError('an architecture is searched with quantized layers alone')
