"""Sensitivities of a result in words and as rows: which layers hurt most."""

from collections.abc import Mapping
from typing import Any

from fliqs_jax.reporting.tables import option_order

_NAMED = 3

# What is lost of the quality that a search rewards, by its name in the config.
_LOST = {
  'minus_loss': 'increase of the loss',
  'accuracy': 'loss of accuracy',
  'minus_bits_per_byte': 'increase of the bits per byte',
}
_LOST_QUALITY = 'loss of quality'


def lost_quality(result: Mapping[str, Any]) -> str:
  """Returns what a sensitivity is a number of, in words."""
  if 'quality' in result['eval']:  # of a user's own
    return _LOST_QUALITY
  return _LOST.get(result['config']['reward']['quality'], _LOST_QUALITY)


def rows(result: Mapping[str, Any]) -> list[dict[str, Any]]:
  """Returns `name`, `options` and `losses` of each decision, empty without any.

  Options go from few bits to many.
  """
  return [
    {
      'name': name,
      'options': sorted(losses, key=option_order),
      'losses': [losses[option] for option in sorted(losses, key=option_order)],
    }
    for name, losses in result.get('sensitivities', {}).items()
  ]


def words(result: Mapping[str, Any]) -> str:
  """Returns a sentence that names the decisions that lose most; empty without any."""
  largest = sorted(
    (
      (max(row['losses']), row['name'], row['options'][_argmax(row['losses'])])
      for row in rows(result)
      if row['losses']
    ),
    reverse=True,
  )
  if not largest:
    return ''
  if largest[0][0] <= 0:
    return 'No format of any layer loses anything by itself.'
  named = ', '.join(
    f'{name} ({loss:.3g} in {option})' for loss, name, option in largest[:_NAMED]
  )
  losses = [max(loss, 0) for loss, _, _ in largest]
  share = sum(losses[:_NAMED]) / sum(losses)
  together = f'; together {share:.0%} of all at their worst' if losses[_NAMED:] else ''
  return f'Most sensitive, by {lost_quality(result)}: {named}{together}.'


def _argmax(values):
  return max(range(len(values)), key=values.__getitem__)
