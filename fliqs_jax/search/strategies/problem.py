"""The record of what a strategy searches, and of the steps that it has for it."""

from typing import NamedTuple

import numpy as np

from fliqs_jax.search.budget import Budget, most_likely_within
from fliqs_jax.search.space import SearchSpace

_SCORE_RANGE = 50.0  # well above the floor of what a policy may rule out


class Problem(NamedTuple):
  """All that a strategy is built from."""

  space: SearchSpace
  target: Budget
  caps: tuple[Budget, ...]  # further budgets that the final choices keep
  num_samples: int  # S
  policy_delay: int  # the first step at which the policy learns
  commit_step: int  # the step from which on the final choices are used
  seed: int
  entropy_schedule: str  # a key of `controller.ENTROPY_SCHEDULES`

  def best_choices(self, scores: np.ndarray) -> np.ndarray:
    """Returns the choices int32[N] within all budgets whose sum of scores is largest.

    Args:
      scores: float[N, K], of which only differences within a decision count.
    """
    scores = np.where(self.space.valid, np.asarray(scores, np.float64), -np.inf)
    losses = np.max(scores, axis=1, keepdims=True) - scores
    largest = np.max(losses, where=np.isfinite(losses), initial=0.0)
    scale = _SCORE_RANGE / largest if largest > 0 else 1.0
    return most_likely_within(
      self.space, self.target.cost_model, -scale * losses, self.target.limit, self.caps
    )
