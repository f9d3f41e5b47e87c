"""The cheapest assignment that loses no more quality than it may, by bisection.

The integer program gives for each budget the assignment of the largest score; over all
budgets that is a front. What an assignment on it loses is measured, between one that
is within the limit and one that is not, until their costs are near each other.
"""

from collections.abc import Callable
import math
from typing import NamedTuple

import numpy as np

from fliqs_jax.search.budget import Budget, cost_range, lowest_within
from fliqs_jax.search.strategies.problem import Problem

_RESOLUTION = 1.01  # of costs
_MOST_POINTS = 16


class Point(NamedTuple):
  """An assignment that was measured."""

  choices: np.ndarray  # int32[N]
  cost: float
  lost: float  # quality


def measure_front(
  problem: Problem,
  scores: np.ndarray,
  measure: Callable[[np.ndarray], float],
  most_lost: float,
) -> list[Point]:
  """Returns the assignments that were measured, cheapest first.

  The first that loses no more than the limit is the one that is sought. Where the
  dearest is not within it, none is sought, and the list has the two ends alone.

  Args:
    problem: whose caps are kept, and whose target is not.
    scores: float[N, K], the worth of each option.
    measure: from choices int32[N] to the quality that they lose.
    most_lost: the limit, in the unit of what `measure` returns.
  """
  space, cost_model = problem.space, problem.target.cost_model
  points = {}  # by choices

  def add(choices):
    lost = measure(choices)
    points[choices.tobytes()] = Point(choices, float(cost_model(space, choices)), lost)
    return points[choices.tobytes()]

  def best(limit):
    return problem._replace(target=Budget(cost_model, limit)).best_choices(scores)

  dearest = add(best(cost_range(space, cost_model)[1]))
  cheapest = lowest_within(space, cost_model, problem.caps)
  if cheapest.tobytes() not in points:
    cheapest = add(cheapest)
    if dearest.lost <= most_lost < cheapest.lost:
      _bisect(best, add, points, most_lost, cheapest.cost, dearest.cost)
  return sorted(points.values(), key=lambda point: point.cost)


def _bisect(best, add, points, most_lost, below, above):
  """Adds points between a cost that loses too much and one that does not."""
  while above > _RESOLUTION * below and len(points) < _MOST_POINTS:
    limit = math.sqrt(above * below)
    choices = best(limit)
    if choices.tobytes() in points:  # what costs less loses too much
      below = limit
      continue
    point = add(choices)
    if point.lost <= most_lost:
      above = point.cost
    else:
      below = limit
