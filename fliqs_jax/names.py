"""What to say of a name that does not exist."""

from collections.abc import Iterable
import difflib


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
