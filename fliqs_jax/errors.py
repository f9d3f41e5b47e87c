"""Errors that end a run in one line, and the text that names what was meant instead."""

from collections.abc import Iterable
import difflib


class ConfigError(ValueError):
  """What a user asked for cannot be done; one line for each problem."""

  def __init__(self, *problems: str):
    super().__init__('\n'.join(problems))
    self.problems = [line for problem in problems for line in problem.splitlines()]


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
  names = list(names)
  nearest = difflib.get_close_matches(str(name), names, n=1, cutoff=0.0)
  expected = expected or f'one of {", ".join(names)}'
  return f'{given}: expected {expected}; the nearest is {nearest[0]!r}'
