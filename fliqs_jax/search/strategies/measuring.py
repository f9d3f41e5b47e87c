"""Which steps measure the quality of samples on shared examples.

A round costs a forward pass of each sample on half of a batch: two thirds of a training
step with four samples. There are enough rounds for a critic of some hundred decisions,
at equal distances from the policy's first step to the commitment, and no more however
long the run is.
"""

import jax
import jax.numpy as jnp
import numpy as np

from fliqs_jax.search.strategies.problem import Problem

MAX_ROUNDS = 128


def measured_steps(problem: Problem) -> np.ndarray:
  """Returns the steps that measure, int[R]."""
  steps = max(problem.commit_step - problem.policy_delay, 1)
  rounds = min(MAX_ROUNDS, steps)
  return problem.policy_delay + np.arange(rounds) * steps // rounds


def count_rounds(problem: Problem) -> int:
  """Returns R, how many rounds a run measures."""
  return len(measured_steps(problem))


def is_measured(problem: Problem, step: jax.Array) -> jax.Array:
  """Returns whether a step measures, bool[]."""
  return jnp.any(step == jnp.asarray(measured_steps(problem)))
