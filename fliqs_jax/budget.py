"""Budgets: the range of costs that a space reaches, and the best choices within one."""

from typing import NamedTuple

import numpy as np
from scipy import optimize

from fliqs_jax.cost_models import CostModel
from fliqs_jax.search_space import SearchSpace

# Cost sums in float64 agree to this, relative to the largest cost.
_TOLERANCE = 1e-9
_TRIALS = 32


class Marginals(NamedTuple):
  """How the cost depends on each decision, the others at their first option."""

  base: float  # the cost with every decision at its first option
  changes: np.ndarray  # [N, K], what each option adds to it; inf where there is none
  additive: bool  # whether the cost is a sum over decisions


def marginals(space: SearchSpace, cost_model: CostModel) -> Marginals:
  """Returns the cost of every single change.

  Whether these add up is tried on random choices: a cost that is not a sum over
  decisions would have to agree with the sum on all of them by chance.
  """
  num_decisions, num_options = space.valid.shape
  base = cost_model(space, np.zeros(num_decisions, np.int32))
  changes = np.full(space.valid.shape, np.inf)
  for option in range(num_options):
    rows = np.flatnonzero(space.valid[:, option])
    choices = np.zeros((len(rows), num_decisions), np.int32)
    choices[np.arange(len(rows)), rows] = option
    changes[rows, option] = cost_model(space, choices) - base
  sizes = space.valid.sum(axis=1)
  trials = np.random.default_rng(0).integers(sizes, size=(_TRIALS, num_decisions))
  sums = base + changes[np.arange(num_decisions), trials].sum(axis=1)
  costs = cost_model(space, trials)
  additive = np.allclose(sums, costs, rtol=_TOLERANCE, atol=_TOLERANCE * abs(base))
  return Marginals(float(base), changes, bool(additive))


def cost_range(space: SearchSpace, cost_model: CostModel) -> tuple[float, float]:
  """Returns the lowest and the highest cost in the space.

  Exact where the cost is a sum over decisions, or does not fall in any of them as the
  others rise, as every cost of formats alone does.
  """
  changes = marginals(space, cost_model).changes
  cheapest = np.argmin(changes, axis=1)
  dearest = np.argmax(np.where(space.valid, changes, -np.inf), axis=1)
  return float(cost_model(space, cheapest)), float(cost_model(space, dearest))


def most_likely_within(
  space: SearchSpace, cost_model: CostModel, log_policy: np.ndarray, target: float
) -> np.ndarray:
  """Returns `argmax_α Σ_i log π_i(α_i)` subject to `C(α) ≤ target`, int32[N].

  Solved exactly, as an integer program, where the cost is a sum over decisions, and by
  greedy repair of the likeliest choices where it is not.

  Args:
    space: the search space.
    cost_model: its cost, in float64.
    log_policy: float[N, K]; what stands where there is no option is not read.
    target: at least the lowest cost of `cost_range`.
  """
  # Options that the policy has ruled out stay options, or a budget may be out of reach.
  floor = np.log(np.finfo(np.float32).tiny)
  log_policy = np.where(space.valid, np.maximum(log_policy, floor), -np.inf)
  likeliest = np.argmax(log_policy, axis=1).astype(np.int32)
  if cost_model(space, likeliest) <= target:
    return likeliest
  costs = marginals(space, cost_model)
  if costs.additive:
    # The solver's own tolerance may overrun the budget by a rounding.
    for slack in (0.0, 1e-6):
      choices = _solve(costs, log_policy, target, slack)
      if choices is not None and cost_model(space, choices) <= target:
        return choices.astype(np.int32)
  return _repair(space, cost_model, log_policy, target, likeliest, costs)


def _solve(costs, log_policy, target, slack):
  """The integer program: one option a decision, the costs within the target."""
  decisions, options = np.nonzero(np.isfinite(costs.changes))
  one_each = decisions == np.arange(len(log_policy))[:, None]
  changes = costs.changes[decisions, options]
  budget = target - costs.base
  scale = max(np.abs(changes).max(), np.finfo(float).tiny)
  solution = optimize.milp(
    -log_policy[decisions, options],
    integrality=np.ones(len(decisions)),
    bounds=optimize.Bounds(0, 1),
    constraints=[
      optimize.LinearConstraint(one_each, 1, 1),
      optimize.LinearConstraint(changes[None] / scale, ub=budget / scale - slack),
    ],
    options={'mip_rel_gap': 0.0},
  )
  if solution.x is None:
    return None
  chosen = np.round(solution.x).astype(bool)
  return options[chosen] if chosen.sum() == len(log_policy) else None


def _repair(space, cost_model, log_policy, target, choices, costs):
  """Takes the change that loses least likelihood a cost saved, until it fits."""
  cost = float(cost_model(space, choices))
  while cost > target:
    candidates, losses, new_costs = _single_changes(
      space, cost_model, log_policy, choices
    )
    # What is saved below the target is worth nothing.
    saved = np.minimum(cost - new_costs, cost - target)
    rate = np.where(saved > 0, losses / np.where(saved > 0, saved, 1), np.inf)
    if np.isinf(rate.min()):  # no single change saves: start from the cheapest
      choices = np.argmin(costs.changes, axis=1).astype(np.int32)
      break
    choices, cost = candidates[np.argmin(rate)], float(new_costs[np.argmin(rate)])
  # A change that was made early may have become needless.
  while True:
    candidates, losses, new_costs = _single_changes(
      space, cost_model, log_policy, choices
    )
    losses = np.where(new_costs <= target, losses, np.inf)
    if losses.min() >= 0:
      return choices
    choices = candidates[np.argmin(losses)]


def _single_changes(space, cost_model, log_policy, choices):
  """All choices one decision away, what they lose in log-likelihood, their costs."""
  rows, options = np.nonzero(space.valid)
  candidates = np.repeat(choices[None], len(rows), axis=0)
  candidates[np.arange(len(rows)), rows] = options
  losses = log_policy[rows, choices[rows]] - log_policy[rows, options]
  return candidates, losses, cost_model(space, candidates)
