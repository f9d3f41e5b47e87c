"""Swaps of formats that are measured together, where losses do not just add up.

What single changes of an unquantized network lose says little of a tight budget, under
which all layers are far from it. So each decision's options are measured again around
the assignment at hand, the others in their formats. These differences are added for
assignments near it, and the best of some of them, measured, is the next one.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from fliqs_jax.search.strategies.problem import Problem

# Of what the decisions that gain by a change gain at most: the price of a change, so
# that some candidates differ in many decisions from the assignment and others in few.
_QUANTILES = (0.1, 0.25, 0.5, 0.7, 0.85)

# M choices int32[N] -> their qualities, float64[M]
Measure = Callable[[Sequence[np.ndarray]], np.ndarray]


class Measured(NamedTuple):
  """An assignment whose quality was predicted, then measured."""

  choices: np.ndarray  # int32[N]
  quality: float
  predicted: float


def refine(
  problem: Problem, measure: Measure, start: Measured, rounds: int
) -> Measured:
  """Returns the best assignment that was measured within the budgets.

  Args:
    problem: whose budgets are kept.
    measure: measures choices, all on the same examples.
    start: an assignment within the budgets.
    rounds: at most; one that finds nothing better is the last.
  """
  best = start
  for _ in range(rounds):
    losses = _losses_around(problem.space.valid, best, measure)
    candidates = _candidates(problem, losses, best.choices)
    if not candidates:
      return best
    qualities = np.nan_to_num(measure(candidates), nan=-np.inf)
    index = int(np.argmax(qualities))
    if not qualities[index] > best.quality:
      return best
    choices = candidates[index]
    lost = losses[np.arange(len(choices)), choices].sum()
    best = Measured(choices, float(qualities[index]), float(best.quality - lost))
  return best


def _losses_around(valid, best, measure):
  """Returns what the quality of an assignment loses by each change, float64[N, K]."""
  rows, options = np.nonzero(valid)
  changes = [
    (i, k) for i, k in zip(rows.tolist(), options.tolist()) if k != best.choices[i]
  ]
  candidates = []
  for decision, option in changes:
    choices = best.choices.copy()
    choices[decision] = option
    candidates.append(choices)
  losses = np.zeros(valid.shape)
  for change, quality in zip(changes, measure(candidates)):
    losses[change] = best.quality - quality
  finite = np.isfinite(losses)
  return np.where(finite, losses, 2 * np.max(losses, where=finite, initial=1.0))


def _candidates(problem, losses, choices):
  """Returns the assignments that lose least, at several prices of a change."""
  changed = np.arange(losses.shape[1]) != choices[:, None]
  gains = np.max(-losses, axis=1, initial=0.0, where=changed & problem.space.valid)
  gains, found = gains[gains > 0], {}
  prices = np.quantile(gains, _QUANTILES) if len(gains) else ()
  for price in (0.0, *prices):
    candidate = problem.best_choices(-(losses + price * changed))
    if not np.array_equal(candidate, choices):
      found[candidate.tobytes()] = candidate
  return list(found.values())
