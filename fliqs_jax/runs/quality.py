"""The quality of a run: one number of its evaluation, and how that reads."""

from collections.abc import Mapping
import math
from typing import Any, NamedTuple

# Keys that an evaluation, a line of a history, or a point may have it under, the
# clearest first, and how they read.
_NAMES = {
  'accuracy': 'accuracy',
  'bits_per_byte': 'bits per byte',
  'quality': 'quality',
}
_LOWER_IS_BETTER = ('bits per byte',)


class Quality(NamedTuple):
  """The number that a finished run is judged by."""

  name: str  # `accuracy`, `bits per byte`, `quality` or `minus the loss`
  value: float  # an accuracy is a fraction
  error: float | None  # the standard error over examples; None where it is unknown

  def __str__(self) -> str:
    return to_text(self.name, self.value)

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
  # A metric of the user's that is called so may be in percent, or a count.
  if 0 <= evaluation.get('accuracy', math.nan) <= 1:
    accuracy = evaluation['accuracy']
    variance = accuracy * (1 - accuracy) / max(evaluation['num_examples'], 1)
    return Quality('accuracy', accuracy, math.sqrt(variance))
  for key in ('bits_per_byte', 'quality'):
    if key in evaluation:
      return Quality(_NAMES[key], evaluation[key], None)
  return Quality('minus the loss', -evaluation['loss'], None)


def find_name(row: Mapping[str, Any]) -> str | None:
  """Returns the key under which a line of a history or a point has it, if it does."""
  return next((key for key in _NAMES if key in row), None)


def to_words(key: str) -> str:
  """Returns how a key from `find_name` reads."""
  return _NAMES[key]


def lower_is_better(name: str) -> bool:
  """Whether less of a quality of this name is better."""
  return name in _LOWER_IS_BETTER


def merit(name: str, value: float) -> float:
  """Returns the value of a quality of this name, or minus it where less is better."""
  return -value if lower_is_better(name) else value


def to_text(name: str, value: float) -> str:
  """Returns how a quality of this name reads."""
  return f'{value:.2%}' if name == 'accuracy' else f'{value:.4g}'
