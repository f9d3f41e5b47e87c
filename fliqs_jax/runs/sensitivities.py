"""Sensitivities of a result: what the quality loses by each format of each decision."""

import jax
import numpy as np

from fliqs_jax.runs.setup import Setup
from fliqs_jax.search.space import SearchSpace
from fliqs_jax.search.strategies import STRATEGIES
from fliqs_jax.training.train_state import TrainState

Sensitivities = dict[str, dict[str, float]]  # {decision: {format: loss of quality}}


def by_name(space: SearchSpace, losses: np.ndarray) -> Sensitivities:
  """Returns losses of quality float[N, K] by the names of decisions and formats."""
  return {
    decision.name: dict(zip(decision.options, map(float, row)))
    for decision, row in zip(space.decisions, losses)
  }


def of_training(setup: Setup, state: TrainState) -> dict[str, Sensitivities]:
  """Returns `{'sensitivities': ...}` of a search that trained, as far as it knows them.

  They are relative to the best format of a decision, and empty where the strategy
  measures no qualities, or has not in so few steps.
  """
  strategy = STRATEGIES[setup.config.search.strategy]
  # Scores that serve any target are qualities.
  if not setup.controller or not strategy.serves_targets:
    return {}
  scores = np.asarray(setup.controller.scores(jax.device_get(state.controller)))
  if not scores.any():
    return {}
  best = np.max(scores, axis=1, where=setup.space.valid, initial=-np.inf)
  return {'sensitivities': by_name(setup.space, best[:, None] - scores)}
