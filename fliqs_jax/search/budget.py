"""Budgets: the range of costs that a space reaches, and the best choices within one.

A budget bounds a cost, by one number where layers add up and by one for each layer
where the cost is their peak. Those *bounded* quantities, `[..., R]`, are what is solved
for here; they are sums over decisions far more often than the peak is.
"""

from collections.abc import Callable, Sequence
import functools
import itertools
from typing import NamedTuple

import numpy as np
from scipy import optimize

from fliqs_jax.search.cost_models import CostModel
from fliqs_jax.search.space import SearchSpace

# Cost sums in float64 agree to this, relative to the largest cost.
_TOLERANCE = 1e-9
_TRIALS = 32


class Budget(NamedTuple):
  """A cost and the most that it may be."""

  cost_model: CostModel
  limit: float


class Marginals(NamedTuple):
  """Costs by each decision's option, the others at their first one.

  R is any shape of costs, none for a single one.
  """

  base: np.ndarray  # [R], the costs with every decision at its first option
  changes: np.ndarray  # [N, K, R], what each option adds; inf where there is none
  additive: bool  # whether the costs are sums over decisions


def marginals(
  space: SearchSpace, costs: Callable[[SearchSpace, np.ndarray], np.ndarray]
) -> Marginals:
  """Returns the costs of every single change.

  Whether these add up is tried on random choices: a cost that is not a sum over
  decisions would have to agree with the sum on all of them by chance.

  Args:
    space: the search space.
    costs: a cost model, or any function from choices int32[B, N] to costs [B, R].
  """
  num_decisions, num_options = space.valid.shape
  (base,) = costs(space, np.zeros((1, num_decisions), np.int32))
  changes = np.full((*space.valid.shape, *np.shape(base)), np.inf)
  for option in range(num_options):
    rows = np.flatnonzero(space.valid[:, option])
    choices = np.zeros((len(rows), num_decisions), np.int32)
    choices[np.arange(len(rows)), rows] = option
    changes[rows, option] = costs(space, choices) - base
  sizes = space.valid.sum(axis=1)
  trials = np.random.default_rng(0).integers(sizes, size=(_TRIALS, num_decisions))
  sums = base + changes[np.arange(num_decisions), trials].sum(axis=1)
  scale = _TOLERANCE * np.abs(base).max()
  additive = np.allclose(sums, costs(space, trials), rtol=_TOLERANCE, atol=scale)
  return Marginals(base, changes, bool(additive))


def cost_range(space: SearchSpace, cost_model: CostModel) -> tuple[float, float]:
  """Returns the lowest and the highest cost in the space.

  Exact where no two layers share a decision, or where the layers that do agree on
  which of its options is the dearest, as they do but for formats of several families
  on one device.
  """
  low, high = (_extreme(space, cost_model, sign) for sign in (1, -1))
  return float(cost_model(space, low)), float(cost_model(space, high))


def lowest_within(
  space: SearchSpace, cost_model: CostModel, caps: Sequence[Budget] = ()
) -> np.ndarray:
  """Returns the choices of lowest cost within the caps, int32[N].

  Exact where costs and caps are sums over decisions; for a peak, the sum over layers is
  lowest. Where caps cannot be met, the choices do not meet them either.
  """
  if not caps:
    return _extreme(space, cost_model, 1)
  changes = marginals(space, functools.partial(_layer_sum, cost_model)).changes
  above = changes - changes.min(axis=1, keepdims=True)
  largest = above[space.valid].max(initial=np.finfo(float).tiny)
  # As likelihoods that stay above the floor of those.
  (capped, limit), *others = caps
  return most_likely_within(space, capped, -50 * above / largest, limit, others)


def most_likely_within(
  space: SearchSpace,
  cost_model: CostModel,
  log_policy: np.ndarray,
  target: float,
  caps: Sequence[Budget] = (),
) -> np.ndarray:
  """Returns `argmax_α Σ_i log π_i(α_i)` subject to `C(α) ≤ target`, int32[N].

  Solved exactly, as an integer program, where what is bounded is a sum over decisions,
  and by greedy repair of the likeliest choices where it is not.

  Args:
    space: the search space.
    cost_model: its cost, in float64.
    log_policy: float[N, K]; what stands where there is no option is not read.
    target: at least the lowest cost of `cost_range`.
    caps: further budgets, which can be met together with the target.
  """
  # Options that the policy has ruled out stay options, or a budget may be out of reach.
  floor = np.log(np.finfo(np.float32).tiny)
  log_policy = np.where(space.valid, np.maximum(log_policy, floor), -np.inf)
  likeliest = np.argmax(log_policy, axis=1).astype(np.int32)
  budgets = (Budget(cost_model, target), *caps)
  if fits(space, likeliest, budgets):
    return likeliest
  costs = [marginals(space, functools.partial(_bounded, b.cost_model)) for b in budgets]
  if all(cost.additive for cost in costs):
    # The solver's own tolerance may overrun the budget by a rounding.
    for slack in (0.0, 1e-6):
      choices = _solve(space, costs, [b.limit for b in budgets], log_policy, slack)
      if choices is not None and fits(space, choices, budgets):
        return choices
  return _repair(space, budgets, log_policy, likeliest)


def fits(space: SearchSpace, choices: np.ndarray, budgets: Sequence[Budget]) -> bool:
  """Returns whether choices int32[N] are within all budgets."""
  return all(b.cost_model(space, choices) <= b.limit for b in budgets)


def _bounded(cost_model, space, choices):
  """Bounded costs, `[..., R]`: the total, or of a peak each layer's."""
  layers = cost_model.per_layer(space, choices)
  return layers if cost_model.combine == 'max' else cost_model.total(layers)[..., None]


def _layer_sum(cost_model, space, choices):
  """A cost that falls with any layer's, be it the peak or not."""
  return cost_model.per_layer(space, choices).sum(axis=-1)


def _extreme(space, cost_model, sign):
  """The choices of the lowest (sign 1) or highest (-1) cost, layer by layer.

  Then the sizes of the architecture one by one, and all again until nothing changes.
  All options of a layer's decisions are tried together, since the best format of its
  weights may depend on that of its activations.
  """
  choices = np.zeros(len(space.decisions), np.int32)
  layer_decisions = {
    tuple(sorted({a for a in assigned if isinstance(a, int)})): None
    for assigned in zip(space.weights, space.activations)
  }
  first = len(space.format_decisions)
  layer_decisions |= {(i,): None for i in range(first, len(space.decisions))}
  while True:
    before = choices
    for decisions in filter(None, layer_decisions):
      sizes = [len(space.decisions[i].options) for i in decisions]
      options = np.array(list(itertools.product(*map(range, sizes))), np.int32)
      candidates = np.repeat(choices[None], len(options), axis=0)
      candidates[:, decisions] = options
      costs = sign * _layer_sum(cost_model, space, candidates)
      choices = candidates[np.argmin(costs)]
    if np.array_equal(choices, before):
      return choices


def _solve(space, costs, limits, log_policy, slack):
  """The integer program: one option a decision, what is bounded within its limit."""
  decisions, options = np.nonzero(space.valid)
  one_each = decisions == np.arange(len(log_policy))[:, None]
  changes = np.concatenate([c.changes[decisions, options] for c in costs], axis=1).T
  room = np.concatenate([limit - c.base for c, limit in zip(costs, limits)])
  scale = np.abs(changes).max(axis=1)
  decided = scale > 0  # what no decision changes constrains none
  changes, room, scale = changes[decided], room[decided], scale[decided]
  solution = optimize.milp(
    -log_policy[decisions, options],
    integrality=np.ones(len(decisions)),
    bounds=optimize.Bounds(0, 1),
    constraints=[
      optimize.LinearConstraint(one_each, 1, 1),
      optimize.LinearConstraint(changes / scale[:, None], ub=room / scale - slack),
    ],
    options={'mip_rel_gap': 0.0},
  )
  if solution.x is None:
    return None
  chosen = np.round(solution.x).astype(bool)
  return options[chosen].astype(np.int32) if chosen.sum() == len(log_policy) else None


def _repair(space, budgets, log_policy, choices):
  """Takes the change that loses least likelihood an excess saved, until all fits."""
  excess = functools.partial(_excess, space, budgets)
  while not fits(space, choices, budgets):
    candidates, losses = _single_changes(space, log_policy, choices)
    # What is saved below a limit is worth nothing.
    saved = excess(choices) - excess(candidates)
    rate = np.where(saved > 0, losses / np.where(saved > 0, saved, 1), np.inf)
    if np.isinf(rate.min()):  # no single change saves: start from the cheapest
      choices = lowest_within(space, budgets[0].cost_model, budgets[1:])
      break
    choices = candidates[np.argmin(rate)]
  # A change that was made early may have become needless.
  while True:
    candidates, losses = _single_changes(space, log_policy, choices)
    losses = np.where(excess(candidates) > 0, np.inf, losses)
    if losses.min() >= 0:
      return choices
    choices = candidates[np.argmin(losses)]


def _excess(space, budgets, choices):
  """By how much choices overrun their budgets, relative to these, `[...]`."""
  return sum(
    np.maximum(_bounded(b.cost_model, space, choices) - b.limit, 0).sum(axis=-1)
    / b.limit
    for b in budgets
  )


def _single_changes(space, log_policy, choices):
  """All choices one decision away, and what they lose in log-likelihood."""
  rows, options = np.nonzero(space.valid)
  candidates = np.repeat(choices[None], len(rows), axis=0)
  candidates[np.arange(len(rows)), rows] = options
  losses = log_policy[rows, choices[rows]] - log_policy[rows, options]
  return candidates, losses
