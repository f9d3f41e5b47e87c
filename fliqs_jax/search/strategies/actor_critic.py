"""The default: a policy gradient without sampling noise, by an additive critic.

The weights train unquantized while the policy learns from forward passes under its
samples, all on the same examples. With the critic's utilities `u` the gradient of

    J(π) = E_π[Q] − λ · E_π[C] + τ · H(π)

over all options of all decisions is exact, and its natural gradient step of size 1/τ
lands at `π = softmax((u − λ·c) / τ)` (Cen et al., 2021, arXiv 2007.06558, Section 3.2).
`c_i[k]` is the expected cost of option k of decision i, the others as they were
sampled, which is exact for additive costs. λ is the multiplier at which E_π[C] meets a
budget that falls from near the highest cost to the target, while the temperature τ
falls to 0.3 of the spread of `u`, both on the entropy schedule. It falls no further,
since samples that hardly differ teach the critic little, and the weights that train
unquantized do not suffer from them. No weight of cost against quality has to be chosen.

Each of T targets has a policy of its own. The samples follow them in turn, so that one
critic learns from all and a step costs no more than for one target.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fliqs_jax.numerics.quantization_error import normal_errors
from fliqs_jax.search import critic
from fliqs_jax.search.budget import cost_range
from fliqs_jax.search.controller import (
  ENTROPY_SCHEDULES,
  Controller,
  masked_softmax,
  policy_entropy,
)
from fliqs_jax.search.cost_models import CostModel
from fliqs_jax.search.options import format_names, split
from fliqs_jax.search.space import SearchSpace
from fliqs_jax.search.strategies.problem import Problem

# The first budget, of the highest cost: most decisions have their widest format.
_FIRST_BUDGET = 0.7
_LAST_TEMPERATURE = 0.3  # of the spread of the utilities, and at first 1
_UPDATES = 12  # of the policy
_BISECTIONS = 40


class ActorCriticState(NamedTuple):
  """The policies of T targets, and what was measured under them."""

  # shape=(T, N, K), float32; entries of options that do not exist are 0
  logits: jax.Array
  # Data, so that a program is the same for all targets.
  limits: jax.Array  # shape=(T,), float32, the targets in the cost model's unit
  first_budgets: jax.Array  # shape=(T,), float32, multiples of the targets
  measurements: critic.Measurements
  commitment: jax.Array  # shape=(N,), int32, the final choices, -1 while there are none


def actor_critic(problem: Problem) -> Controller:
  """Returns the controller that the module describes."""
  space, valid = problem.space, problem.space.valid
  limits = np.array(problem.limits)
  own = problem.limits.index(problem.target.limit)
  errors = _option_errors(space)
  update_every = max(len(problem.measured_steps()) // _UPDATES, 1)

  def update(state, outcome, step):
    recorded = critic.record(state.measurements, outcome.choices, outcome.qualities)
    measurements = jax.tree.map(
      functools.partial(jnp.where, outcome.measured), recorded, state.measurements
    )
    improves = outcome.measured & (measurements.count % update_every == 0)

    def improve():
      worth = critic.utilities(measurements, errors)
      return _improved(problem, state, worth, outcome.choices, step)

    logits = jax.lax.cond(improves, improve, lambda: state.logits)
    budgets, temperature = _annealed(problem, state.first_budgets, step)
    metrics = {
      'reward': jnp.mean(outcome.qualities),
      'entropy': jnp.mean(policy_entropy(state.logits, valid)),
      'temperature': temperature,
      'budget': jnp.mean(budgets),
    }
    return state._replace(logits=logits, measurements=measurements), metrics

  def sample(state, keys):
    turns = state.measurements.count * len(keys) + jnp.arange(len(keys))
    policies = masked_softmax(state.logits, valid)[turns % len(limits)]
    sampled = stratified_samples(policies, keys)
    return jnp.where(state.commitment >= 0, state.commitment, sampled)

  return Controller(
    init=functools.partial(_first_state, problem, limits, errors),
    sample=sample,
    update=update,
    policy=lambda state: masked_softmax(state.logits[own], valid),
    commit=lambda state, choices: state._replace(commitment=choices),
    final_choices=lambda state: state.commitment,
    scores=lambda state: critic.utilities(state.measurements, errors),
    is_measured=problem.is_measured,
  )


def _first_state(problem, limits, errors):
  """Returns the state before any measurement, whose policy the prior has made."""
  valid, rounds = problem.space.valid, len(problem.measured_steps())
  keys = jax.random.split(jax.random.key(0), problem.num_samples)
  none = critic.no_measurements(rounds, problem.num_samples, len(valid))
  middle = jnp.argmax(jax.random.uniform(keys[0], valid.shape) * valid, axis=1)
  choices = jnp.broadcast_to(middle.astype(jnp.int32), none.choices.shape[1:])
  state = ActorCriticState(
    logits=jnp.zeros((len(limits), *valid.shape), jnp.float32),
    limits=jnp.asarray(limits, jnp.float32),
    first_budgets=jnp.asarray(_first_budgets(problem, limits), jnp.float32),
    measurements=none,
    commitment=jnp.full(valid.shape[:1], -1, jnp.int32),
  )
  worth = critic.utilities(none, errors)
  logits = _improved(problem, state, worth, choices, problem.policy_delay)
  return state._replace(logits=logits)


def _improved(problem, state, worth, choices, step):
  """Returns the logits [T, N, K] after a natural gradient step, by utilities [N, K]."""
  space, valid = problem.space, problem.space.valid
  worth = worth - jnp.max(jnp.where(valid, worth, -jnp.inf), axis=1, keepdims=True)
  spread = jnp.sqrt(jnp.mean(jnp.square(worth), where=valid))
  worth = worth / jnp.where(spread > 0, spread, 1.0)

  def towards(target):
    limit, first = target
    budget, temperature = _annealed(problem, first, step)
    costs = expected_costs(space, problem.target.cost_model, limit, choices)
    return _constrained_logits(worth, costs, budget, temperature, valid)

  return jax.lax.map(towards, (state.limits, state.first_budgets))


def _first_budgets(problem, limits):
  """Returns the budgets before the first round, in multiples of the targets, [T]."""
  _, highest = cost_range(problem.space, problem.target.cost_model)
  return np.maximum(_FIRST_BUDGET * highest / limits, 1.0)


def _annealed(problem, first_budget, step):
  """Returns the budget in multiples of the target, the temperature in the spread's."""
  schedule = ENTROPY_SCHEDULES[problem.entropy_schedule]
  steps = max(problem.commit_step - problem.policy_delay, 1)
  progress = (step - problem.policy_delay) / steps
  risen = schedule(jnp.clip(progress, 0.0, 1.0))
  return jnp.exp((1 - risen) * jnp.log(first_budget)), _LAST_TEMPERATURE**risen


def _option_errors(space):
  """Returns the relative error of each option on normal data, float32[N, K].

  That of a pair is the mean of its two formats'.
  """
  found = {option for d in space.format_decisions for option in d.options}
  names = sorted(format_names(found))
  by_name = dict(zip(names, normal_errors(names)))
  of_option = {o: np.mean([by_name[name] for name in split(o)]) for o in found}
  errors = np.zeros(space.valid.shape, np.float32)
  for row, decision in zip(errors, space.format_decisions):
    row[: len(decision.options)] = [of_option[o] for o in decision.options]
  return errors / errors.max()


def stratified_samples(policy: jax.Array, keys: jax.Array) -> jax.Array:
  """Returns samples int32[S, N] that follow the policy more evenly than chance.

  Each sample by itself is distributed as the policy is. The S samples of a decision
  are one from each S-th part of its distribution (McKay et al., 1979, Latin hypercube
  sampling), in an order that is random for each decision.

  Args:
    policy: float32[N, K], or float32[S, N, K] where each sample has its own.
    keys: [S], of which the first sets all samples; consumed.
  """
  num_samples, num_decisions = keys.shape[0], policy.shape[-2]
  order_key, offset_key = jax.random.split(keys[0])
  parts = jnp.broadcast_to(
    jnp.arange(num_samples)[:, None], keys.shape + (num_decisions,)
  )
  parts = jax.random.permutation(order_key, parts, axis=0, independent=True)
  offsets = jax.random.uniform(offset_key, (num_samples, num_decisions))
  quantiles = (parts + offsets) / num_samples
  cumulative = jnp.cumsum(policy, axis=-1)
  chosen = jnp.sum(cumulative <= quantiles[..., None], axis=-1)
  # A cumulative sum may end a rounding below 1.
  last = jnp.max(jnp.where(policy > 0, jnp.arange(policy.shape[-1]), 0), axis=-1)
  return jnp.minimum(chosen, last).astype(jnp.int32)


def expected_costs(
  space: SearchSpace, cost_model: CostModel, limit: jax.Array, choices: jax.Array
) -> jax.Array:
  """Returns the expected cost of each option, in multiples of a limit, float32[N, K].

  The other decisions are as they were sampled: the conditional expectation over S
  samples, which differs between options by exactly their own cost where costs add up.

  Args:
    space: the search space.
    cost_model: its cost.
    limit: float32[], in the cost model's unit.
    choices: int32[S, N].
  """
  num_options = space.valid.shape[1]

  def of_decision(decision):
    def of_option(option):
      changed = choices.at[:, decision].set(option)
      return jnp.mean(cost_model(space, changed)) / limit

    return jax.lax.map(of_option, jnp.arange(num_options))

  costs = jax.lax.map(of_decision, jnp.arange(choices.shape[1]))
  own = jnp.take_along_axis(costs, choices.T, axis=1)  # [N, S], of the sampled options
  mean = jnp.mean(cost_model(space, choices)) / limit
  # So that Σ_i E_π[c_i] is the expected cost of the network.
  return costs - jnp.mean(own, axis=1, keepdims=True) + mean / choices.shape[1]


def _constrained_logits(worth, costs, budget, temperature, valid):
  """Returns `(worth − λ·costs) / τ` with the smallest λ that meets the budget."""

  def logits(multiplier):
    values = (worth - multiplier * costs) / temperature
    values = values - jnp.max(jnp.where(valid, values, -jnp.inf), axis=1, keepdims=True)
    return jnp.where(valid, values, 0.0)

  def expected_cost(multiplier):
    return jnp.sum(masked_softmax(logits(multiplier), valid) * costs, where=valid)

  def halve(_, bounds):
    low, high = bounds
    middle = jnp.where(low > 0, jnp.sqrt(low * high), high / 2)
    above = expected_cost(middle) > budget
    return jnp.where(above, middle, low), jnp.where(above, high, middle)

  _, high = jax.lax.fori_loop(
    0, _BISECTIONS, halve, (jnp.float32(1e-4), jnp.float32(1e8))
  )
  return logits(jnp.where(expected_cost(0.0) > budget, high, 0.0))
