"""Sensitivities: each option measured alone, the other decisions at their widest.

The baseline of post-training mixed precision (HAWQ, Dong et al., 2019, arXiv
1905.03696, and many since): `u_i[k]` is the mean quality lost by option k of decision
i, and the assignment of the largest sum within the budget is an integer program.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fliqs_jax.errors import ConfigError
from fliqs_jax.search.controller import Controller
from fliqs_jax.search.strategies.problem import Problem


class SensitivityState(NamedTuple):
  """Sums over the measurements of M single changes."""

  turn: jax.Array  # shape=(), int32, changes that were measured so far
  sums: jax.Array  # shape=(M,), float32, of what the changes lose
  counts: jax.Array  # shape=(M,), float32
  commitment: jax.Array  # shape=(N,), int32, the final choices, -1 while there are none


def sensitivity(problem: Problem) -> Controller:
  """Returns the strategy that the module describes.

  Sample 0 of each round is the widest assignment, with which the others are compared.

  Raises:
    ConfigError: where not every change can be measured before the commitment.
  """
  valid = problem.space.valid
  widest, a_round = _widest(problem), problem.num_samples - 1
  decisions, options = _changes(problem, widest)

  def turns(state):
    """Returns which changes are next, int32[S − 1]."""
    return (state.turn + jnp.arange(a_round)) % len(decisions)

  def sample(state, keys):
    del keys  # the order follows from the state
    next_turns = turns(state)
    changed = jnp.asarray(decisions)[next_turns]
    choices = jnp.tile(jnp.asarray(widest, jnp.int32), (problem.num_samples, 1))
    choices = choices.at[1 + jnp.arange(a_round), changed].set(
      jnp.asarray(options, jnp.int32)[next_turns]
    )
    return jnp.where(state.commitment >= 0, state.commitment, choices)

  def update(state, outcome, step):
    del step
    weight = jnp.asarray(outcome.measured, jnp.float32)
    lost = outcome.qualities[1:] - outcome.qualities[0]
    measured = turns(state)
    state = state._replace(
      turn=state.turn + a_round * jnp.asarray(outcome.measured, jnp.int32),
      sums=state.sums.at[measured].add(weight * lost),
      counts=state.counts.at[measured].add(weight),
    )
    return state, {'reward': jnp.mean(outcome.qualities)}

  def scores(state):
    means = state.sums / jnp.maximum(state.counts, 1)
    return jnp.zeros(valid.shape).at[decisions, options].set(means)

  def final_choices(state):
    return jnp.where(state.commitment >= 0, state.commitment, widest)

  return Controller(
    init=lambda: SensitivityState(
      turn=jnp.zeros((), jnp.int32),
      sums=jnp.zeros(len(decisions), jnp.float32),
      counts=jnp.zeros(len(decisions), jnp.float32),
      commitment=jnp.full(len(valid), -1, jnp.int32),
    ),
    sample=sample,
    update=update,
    policy=lambda state: jax.nn.one_hot(final_choices(state), valid.shape[1]),
    commit=lambda state, choices: state._replace(commitment=choices),
    final_choices=final_choices,
    scores=scores,
    is_measured=problem.is_measured,
  )


def _changes(problem, widest):
  """Returns the decision and the option of each single change, int[M] each."""
  valid = problem.space.valid
  decisions, options = np.nonzero(
    valid & (np.arange(valid.shape[1]) != widest[:, None])
  )
  room = (problem.num_samples - 1) * len(problem.measured_steps())
  if room < len(decisions):
    raise ConfigError(
      f'search.strategy=sensitivity: {len(decisions)} changes are to be measured, and '
      f'there is room for {room}: expected a later search.commit_step, or more '
      'search.num_samples, 2 at least'
    )
  return decisions, options


def _widest(problem):
  """Returns the dearest option of each decision, the others at their first."""
  cost, choices = (
    problem.target.cost_model,
    np.zeros(len(problem.space.valid), np.int32),
  )
  widest = choices.copy()
  for i, decision in enumerate(problem.space.decisions):
    changed = np.tile(choices, (len(decision.options), 1))
    changed[:, i] = np.arange(len(decision.options))
    widest[i] = np.argmax(cost(problem.space, changed))
  return widest
