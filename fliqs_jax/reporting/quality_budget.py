"""A budget of quality in words and rows: the assignments that were measured for it."""

from collections.abc import Mapping
from typing import Any

from fliqs_jax.runs import quality


def words(result: Mapping[str, Any]) -> str:
  """Returns what a budget of quality came to, in a sentence; empty without one."""
  front = result.get('front')
  if not front:
    return ''
  before = quality.from_evaluation(result['post_training']['unquantized_eval'])
  (chosen,) = (point for point in front if point['chosen'])
  limit = quality.lost_to_text(before.name, limit_of(result))
  return (
    f'Of {len(front)} assignments that were measured, the cheapest that loses at most '
    f'{limit} of the unquantized {before.name} of {before} loses '
    f'{quality.lost_to_text(before.name, chosen["lost"])}.'
  )


def limit_of(result: Mapping[str, Any]) -> float:
  """Returns the most quality that the result's run could lose."""
  return result['config']['search']['max_quality_drop']


def lost_quality(result: Mapping[str, Any]) -> str:
  """Returns what a front's `lost` is a number of, with its unit."""
  name = quality.from_evaluation(result['eval']).name
  return 'points of accuracy lost' if name == 'accuracy' else f'lost in {name}'
