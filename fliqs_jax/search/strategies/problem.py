"""The record of what a strategy searches, and of the steps that it has for it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fliqs_jax.search.budget import Budget, most_likely_within
from fliqs_jax.search.space import SearchSpace

# A round costs a forward pass of each sample on half of a batch: two thirds of a
# training step with four samples. These are enough for some hundred decisions.
_MAX_ROUNDS = 128

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
  # Limits of all targets whose searches share the steps before the commitment, that of
  # `target` among them; empty for that one alone.
  shared_limits: tuple[float, ...] = ()

  @property
  def limits(self) -> tuple[float, ...]:
    """The limits of all T targets that are searched for at once."""
    return self.shared_limits or (self.target.limit,)

  def measured_steps(self) -> np.ndarray:
    """Returns the steps that measure samples on shared examples, int[R].

    They lie at equal distances from the policy's first step to the commitment, and are
    no more than 128, however long the run is.
    """
    steps = max(self.commit_step - self.policy_delay, 1)
    rounds = min(_MAX_ROUNDS, steps)
    return self.policy_delay + np.arange(rounds) * steps // rounds

  def is_measured(self, step: jax.Array) -> jax.Array:
    """Returns whether a step measures, bool[]."""
    return jnp.any(step == jnp.asarray(self.measured_steps()))

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
