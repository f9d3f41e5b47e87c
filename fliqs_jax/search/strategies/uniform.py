"""The uniform model: one format for all layers, the widest within the budget."""

import jax
import jax.numpy as jnp
import numpy as np

from fliqs_jax.errors import ConfigError
from fliqs_jax.search.budget import fits
from fliqs_jax.search.controller import Controller
from fliqs_jax.search.strategies.problem import Problem


def uniform(problem: Problem) -> Controller:
  """Returns the strategy that commits to a uniform model before the first step.

  Pinned layers keep their formats.

  Raises:
    ConfigError: where no format that all decisions have is within the budgets.
  """
  choices = _best_uniform(problem)
  committed = lambda state: jnp.asarray(choices)
  return Controller(
    init=lambda: (),
    sample=lambda state, keys: jnp.tile(committed(state), (problem.num_samples, 1)),
    update=lambda state, outcome, step: (
      state,
      {'reward': jnp.mean(outcome.qualities)},
    ),
    policy=lambda state: jax.nn.one_hot(choices, problem.space.valid.shape[1]),
    commit=lambda state, choices: state,
    final_choices=committed,
    scores=lambda state: jax.nn.one_hot(choices, problem.space.valid.shape[1]),
  )


def uniform_choices(problem: Problem) -> list[np.ndarray]:
  """Returns the choices int32[N] of each uniform model within the budgets."""
  space, budgets = problem.space, (problem.target, *problem.caps)
  options = [decision.options for decision in space.decisions]
  common = [name for name in options[0] if all(name in names for names in options)]
  found = [
    np.array([names.index(name) for names in options], np.int32) for name in common
  ]
  return [choices for choices in found if fits(space, choices, budgets)]


def _best_uniform(problem):
  found = uniform_choices(problem)
  if not found:
    raise ConfigError(
      'search.strategy=uniform: no format that all decisions have is within the '
      'budget: expected a larger target, or another strategy'
    )
  cost_model = problem.target.cost_model
  return max(found, key=lambda choices: cost_model(problem.space, choices))
