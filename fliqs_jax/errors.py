"""Errors that end a run in one line, and the text that names what was meant instead."""

from collections.abc import Callable, Iterable
import difflib
from typing import ParamSpec, TypeVar

_Arguments = ParamSpec('_Arguments')
_Result = TypeVar('_Result')


class ConfigError(ValueError):
  """A user's mistake: what was asked for cannot be done; one line for each problem."""

  def __init__(self, *problems: str):
    super().__init__('\n'.join(problems))
    self.problems = [line for problem in problems for line in problem.splitlines()]


class Problems:
  """The user's mistakes that were found so far, to be reported all together."""

  def __init__(self, *lines: str):
    self._lines = list(lines)

  def add(self, *lines: str) -> None:
    """Adds those lines that are not among the problems yet."""
    self._lines += [line for line in lines if line not in self._lines]

  def attempt(
    self,
    function: Callable[_Arguments, _Result],
    *args: _Arguments.args,
    **kwargs: _Arguments.kwargs,
  ) -> _Result | None:
    """Returns the function's result, or None where it finds a mistake."""
    try:
      return function(*args, **kwargs)
    except ConfigError as error:
      self.add(*error.problems)

  def raise_any(self) -> None:
    """Raises ConfigError where there are problems."""
    if self._lines:
      raise ConfigError(*self._lines)


class RunError(RuntimeError):
  """The run cannot go on: its disk, its checkpoints or its numbers; one line."""


class Preempted(Exception):
  """The run was asked to stop and has saved a checkpoint; started again it goes on."""


def not_among(
  given: str, name: str, names: Iterable[str], expected: str | None = None
) -> str:
  """Returns one line: what was given, what was expected, and the nearest name.

  Args:
    given: what was given, in words, as `unknown model 'resnet17'`.
    name: the name in it.
    names: those there are.
    expected: in words; by default the list of names.
  """
  names = list(map(str, names))
  nearest = difflib.get_close_matches(str(name), names, n=1, cutoff=0.0)
  expected = expected or f'one of {", ".join(names)}'
  return f'{given}: expected {expected}; the nearest is {nearest[0]!r}'
