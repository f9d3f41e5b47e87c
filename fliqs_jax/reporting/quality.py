"""The quality of a run: one number of its evaluation, and how that reads."""

from collections.abc import Mapping
import math
from typing import NamedTuple

# What the lines of a history and an evaluation may call it, the clearest first.
_NAMES = ('accuracy', 'quality')


class Quality(NamedTuple):
  """The number that a finished run is judged by."""

  name: str  # `accuracy`, `quality` or `minus the loss`
  value: float  # the more, the better; an accuracy is a fraction
  error: float | None  # the standard error over examples; None where it is unknown

  def __str__(self) -> str:
    return to_text(self.name, self.value)

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

  It is the accuracy where there is one, else what a task of the user's own calls
  `quality`, else minus the loss.

  Args:
    evaluation: the `eval` of a result: `loss`, `num_examples` and more.
  """
  # A metric of the user's that is called so may be in percent, or a count.
  if 0 <= evaluation.get('accuracy', math.nan) <= 1:
    accuracy = evaluation['accuracy']
    variance = accuracy * (1 - accuracy) / max(evaluation['num_examples'], 1)
    return Quality('accuracy', accuracy, math.sqrt(variance))
  if 'quality' in evaluation:
    return Quality('quality', evaluation['quality'], None)
  return Quality('minus the loss', -evaluation['loss'], None)


def logged_name(row: Mapping[str, float]) -> str | None:
  """Returns the name under which a line of a history has the quality, if it does."""
  return next((name for name in _NAMES if name in row), None)


def to_text(name: str, value: float) -> str:
  """Returns how a quality of this name reads."""
  return f'{value:.2%}' if name == 'accuracy' else f'{value:.4g}'
