"""The quality of a run: one number of its evaluation, and how that reads."""

from collections.abc import Mapping
import math
from typing import Any, NamedTuple

# Keys that an evaluation, a line of a history, or a point may have it under, the
# clearest first.
_KEYS = ('accuracy', 'bits_per_byte', 'quality', 'minus_the_loss')
_LOWER_IS_BETTER = ('bits per byte',)


class Quality(NamedTuple):
  """The number that a finished run is judged by."""

  name: str  # `accuracy`, `bits per byte`, `quality` or `minus the loss`
  value: float  # an accuracy is a fraction
  error: float | None  # the standard error over examples; None where it is unknown

  def __str__(self) -> str:
    return to_text(self.name, self.value)

  @property
  def named(self) -> str:
    """The value with its name; an accuracy has its percent sign for one."""
    if self.name == 'accuracy':
      return str(self)
    words = str(self), self.name
    return ' '.join(words if lower_is_better(self.name) else words[::-1])

  @property
  def key(self) -> str:
    """The key that a point has it under."""
    return self.name.replace(' ', '_')

  @property
  def merit(self) -> float:
    """The value so that more is better, as `merit` returns it."""
    return merit(self.name, self.value)

  def against(self, other: 'Quality') -> str:
    """Returns how the other, of the same name, compares to this, in words."""
    difference = other.value - self.value
    if difference == 0:
      return 'the same'
    percent = self.name == 'accuracy'
    size = (
      f'{abs(100 * difference):.2f} points' if percent else f'{abs(difference):.4g}'
    )
    words = f'{size} {"more" if difference > 0 else "less"}'
    if lower_is_better(self.name):
      words += f', which is {"worse" if difference > 0 else "better"}'
    if percent and abs(difference) < math.hypot(self.error, other.error):
      words += ', which is within the standard error of the difference'
    return words


def from_evaluation(evaluation: Mapping[str, float]) -> Quality:
  """Returns the quality that an evaluation measured.

  It is the accuracy where there is one, else the bits per byte, else what a task of the
  user's own calls `quality`, else minus the loss.

  Args:
    evaluation: the `eval` of a result: `loss`, `num_examples` and more.
  """
  key = find_name(evaluation)
  if key is None:
    return Quality('minus the loss', -evaluation['loss'], None)
  value, error = evaluation[key], None
  if key == 'accuracy':
    variance = value * (1 - value) / max(evaluation['num_examples'], 1)
    error = math.sqrt(variance)
  return Quality(to_words(key), value, error)


def find_name(row: Mapping[str, Any]) -> str | None:
  """Returns the key under which a line of a history or a point has it, if it does."""
  found = (key for key in _KEYS if key in row)
  # A metric of the user's that is called accuracy may be in percent, or a count.
  return next((k for k in found if k != 'accuracy' or 0 <= row[k] <= 1), None)


def to_words(key: str) -> str:
  """Returns how a key from `find_name` reads."""
  return key.replace('_', ' ')


def to_title(name: str) -> str:
  """Returns what a column or an axis of a quality of this name is called."""
  return f'{name} (lower is better)' if lower_is_better(name) else name


def lower_is_better(name: str) -> bool:
  """Returns whether less of a quality of this name is better."""
  return name in _LOWER_IS_BETTER


def merit(name: str, value: float) -> float:
  """Returns the value of a quality of this name, or minus it where less is better."""
  return -value if lower_is_better(name) else value


def to_text(name: str, value: float) -> str:
  """Returns how a quality of this name reads."""
  return f'{value:.2%}' if name == 'accuracy' else f'{value:.4g}'


def lost(before: Quality, after: Quality) -> float:
  """Returns by how much a quality is worse, an accuracy in points."""
  return (100 if before.name == 'accuracy' else 1) * (before.merit - after.merit)


def lost_to_text(name: str, value: float) -> str:
  """Returns how what `lost` returns reads, of a quality of this name."""
  return f'{value:.2f} points' if name == 'accuracy' else f'{value:.4g} in {name}'
