"""The Pareto front of runs by cost and quality."""

from collections.abc import Sequence
import math


def pareto_front(pairs: Sequence[tuple[float, float]]) -> list[bool]:
  """Returns which pairs (cost, quality) are on the Pareto front.

  On it is what no other pair beats in one of the two and at least equals in the other;
  equal pairs are on it together.
  """
  best = set()  # pairs on the front, from the cheapest on
  highest = -math.inf
  for cost, quality in sorted(pairs, key=lambda pair: (pair[0], -pair[1])):
    if quality > highest:
      highest = quality
      best.add((cost, quality))
  return [tuple(pair) in best for pair in pairs]
