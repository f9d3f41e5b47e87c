"""Strategies that measure whole assignments and keep the best: random and exhaustive.

The candidates take turns, in groups that are drawn anew in each turn, and are compared
by their mean quality less that of the rounds in which they were measured.
"""

import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fliqs_jax.errors import ConfigError
from fliqs_jax.search.budget import fits
from fliqs_jax.search.controller import Controller
from fliqs_jax.search.strategies.problem import Problem

NUM_RANDOM = 8
MAX_EXHAUSTIVE = 4096


class CandidatesState(NamedTuple):
  """Sums over the measurements of M candidates."""

  turn: jax.Array  # shape=(), int32, samples that were measured so far
  sums: jax.Array  # shape=(M,), float32, of qualities less those of their rounds
  counts: jax.Array  # shape=(M,), float32
  commitment: jax.Array  # shape=(N,), int32, the final choices, -1 while there are none


def random(problem: Problem) -> Controller:
  """Returns the strategy that keeps the best of eight random assignments.

  Each is the best one within the budgets for scores that are drawn at random, so that
  it makes use of the budget.
  """
  generator = np.random.default_rng(problem.seed)
  shape = (NUM_RANDOM, *problem.space.valid.shape)
  candidates = [problem.best_choices(scores) for scores in generator.random(shape)]
  return _best_candidate(problem, np.stack(candidates))


def exhaustive(problem: Problem) -> Controller:
  """Returns the strategy that measures every assignment within the budgets.

  Raises:
    ConfigError: where there are more than `MAX_EXHAUSTIVE` assignments, or fewer
      measurements than assignments.
  """
  sizes = [len(decision.options) for decision in problem.space.decisions]
  if math.prod(sizes) > MAX_EXHAUSTIVE:
    raise ConfigError(
      f'search.strategy=exhaustive: expected {MAX_EXHAUSTIVE} assignments or fewer, '
      f'found {math.prod(sizes):.3g}; tie layers with search.groups, or name fewer '
      'search.formats'
    )
  everything = itertools.product(*map(range, sizes))
  budgets = (problem.target, *problem.caps)
  within = [c for c in map(np.int32, everything) if fits(problem.space, c, budgets)]
  measurements = len(problem.measured_steps()) * problem.num_samples
  if measurements < len(within):
    raise ConfigError(
      f'search.strategy=exhaustive: {len(within)} assignments are within the budget, '
      f'and {measurements} can be measured: expected a later search.commit_step, or '
      'fewer assignments'
    )
  return _best_candidate(problem, np.stack(within))


def _best_candidate(problem, candidates):
  """Returns the controller over candidates int32[M, N]."""
  num_candidates, num_decisions = candidates.shape
  num_options = problem.space.valid.shape[1]

  def turns(state):
    """Returns which candidates are next, int32[S]."""
    turn = state.turn + jnp.arange(problem.num_samples)

    def candidate(turn):
      key = jax.random.fold_in(jax.random.key(problem.seed), turn // num_candidates)
      return jax.random.permutation(key, num_candidates)[turn % num_candidates]

    return jax.vmap(candidate)(turn)

  def sample(state, keys):
    del keys  # the order follows from the state
    return jnp.where(
      state.commitment >= 0, state.commitment, jnp.asarray(candidates)[turns(state)]
    )

  def update(state, outcome, step):
    del step
    weight = jnp.asarray(outcome.measured, jnp.float32)
    centred = outcome.qualities - jnp.mean(outcome.qualities)
    measured = turns(state)
    state = state._replace(
      turn=state.turn + problem.num_samples * jnp.asarray(outcome.measured, jnp.int32),
      sums=state.sums.at[measured].add(weight * centred),
      counts=state.counts.at[measured].add(weight),
    )
    return state, {'reward': jnp.mean(outcome.qualities)}

  def best(state):
    means = state.sums / jnp.maximum(state.counts, 1)
    leading = jnp.argmax(jnp.where(state.counts > 0, means, -jnp.inf))
    chosen = jnp.asarray(candidates)[leading]
    return jnp.where(state.commitment >= 0, state.commitment, chosen)

  return Controller(
    init=lambda: CandidatesState(
      turn=jnp.zeros((), jnp.int32),
      sums=jnp.zeros(num_candidates, jnp.float32),
      counts=jnp.zeros(num_candidates, jnp.float32),
      commitment=jnp.full(num_decisions, -1, jnp.int32),
    ),
    sample=sample,
    update=update,
    policy=lambda state: jax.nn.one_hot(best(state), num_options),
    commit=lambda state, choices: state._replace(commitment=choices),
    final_choices=best,
    scores=lambda state: jax.nn.one_hot(best(state), num_options),
    is_measured=problem.is_measured,
  )
