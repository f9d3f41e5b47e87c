"""A budget of quality: the cheapest assignment that loses no more than it may.

What an assignment loses is measured on the examples of the evaluation, since what a
network makes of examples that it was trained on says little of others, and since the
number that is kept is then the one that the result reports. Some ten assignments are
compared: where even that choice shall not touch the examples that decide in the end,
let `input.eval_split` name others.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from fliqs_jax.errors import ConfigError
from fliqs_jax.runs import quality
from fliqs_jax.runs.setup import Setup
from fliqs_jax.search.cheapest import measure_front

_ROUNDING = 1e-6  # of an accuracy, which is a mean of float32


def cheapest(
  setup: Setup,
  losses: np.ndarray,
  evaluate: Callable[[np.ndarray], tuple[Mapping[str, float], Any]],
  before: Mapping[str, float],
) -> tuple[np.ndarray, dict[str, Any]]:
  """Returns the choices int32[N], and the fields of a result that tell of the front.

  Args:
    setup: of the run.
    losses: float[N, K], the sensitivities.
    evaluate: from choices to their evaluation, and more.
    before: the evaluation of the unquantized network.

  Raises:
    ConfigError: where every assignment loses more; one line with the range.
  """
  limit, reference = setup.config.search.max_quality_drop, _quality(before)

  def measure(choices):
    evaluated, _ = evaluate(choices)
    return quality.lost(reference, _quality(evaluated))

  points = measure_front(setup.problem, -losses, measure, limit + _ROUNDING)
  within = [point for point in points if point.lost <= limit + _ROUNDING]
  if not within:
    raise ConfigError(_none_within(setup, reference, points))
  front = [
    {
      'cost': point.cost,
      'lost': point.lost,
      'within': point.lost <= limit + _ROUNDING,
      'chosen': point is within[0],
    }
    for point in points
  ]
  return within[0].choices, {'target': None, 'front': front}


def _quality(evaluation):
  return quality.from_evaluation(evaluation)


def _none_within(setup, reference, points):
  search, unit = setup.config.search, setup.cost_model.unit
  measured = ' to '.join(
    f'{quality.lost_to_text(reference.name, point.lost)} at {point.cost:.6g} {unit}'
    for point in points
  )
  return (
    f'search.max_quality_drop={search.max_quality_drop:g}: every assignment of '
    f'search.formats={search.formats!r} loses more of the unquantized {reference.name} '
    f'of {reference}: measured {measured}; expected a larger drop, or wider formats'
  )
