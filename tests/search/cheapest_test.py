"""The cheapest assignment within a limit, against all assignments of a small space."""

import itertools

import numpy as np
import pytest

from fliqs_jax.layers.layer import Layer
from fliqs_jax.search.budget import Budget
from fliqs_jax.search.cheapest import measure_front
from fliqs_jax.search.cost_models import get_cost_model
from fliqs_jax.search.space import build_space
from fliqs_jax.search.strategies.problem import Problem

OPTIONS = ('int2', 'int3', 'int4', 'int8')
ERRORS = np.array([1.0, 0.3, 0.08, 0.0])
SENSITIVITIES = np.random.default_rng(1).lognormal(0.0, 1.0, 5)
LOSSES = SENSITIVITIES[:, None] * ERRORS


def make_problem(caps=()):
  sizes = np.random.default_rng(0).lognormal(0.0, 0.7, 5)
  layers = [
    Layer(f'layer{i}', 'op', 'dense', (1, 8), (8, 8), (1, 8), int(1e6 * size), 64)
    for i, size in enumerate(sizes)
  ]
  space = build_space(layers, OPTIONS)
  target = Budget(get_cost_model('bops'), 0.0)  # of no effect
  return Problem(space, target, caps, 1, 0, 0, 0, 'cosine')


def lost(choices):
  return float(LOSSES[np.arange(5), choices].sum())


@pytest.mark.parametrize('limit', [0.0, 0.1, 0.5, 1.0, 2.0, 4.0, 1e9])
def test_it_is_the_cheapest_of_all_but_for_the_resolution(limit):
  problem = make_problem()
  points = measure_front(problem, -LOSSES, lost, limit)
  costs = [point.cost for point in points]
  assert costs == sorted(costs) and len(points) <= 16
  found = next(point for point in points if point.lost <= limit)
  cost_model, space = problem.target.cost_model, problem.space
  every = np.array([*itertools.product(range(4), repeat=5)], np.int32)
  all_costs = cost_model(space, every)
  within = np.array([lost(choices) <= limit for choices in every])
  # The front has its corners alone: what lies between them costs a step more.
  assert found.cost <= 1.15 * all_costs[within].min()
  assert found.cost == pytest.approx(cost_model(space, found.choices))


def test_where_all_lose_too_much_both_ends_are_told():
  points = measure_front(make_problem(), -LOSSES, lambda c: 1 + lost(c), 0.5)
  assert [point.lost for point in points] == pytest.approx([1 + LOSSES[:, 0].sum(), 1])


def test_caps_are_kept_and_nothing_is_measured_twice():
  cap = Budget(get_cost_model('model_size'), 5 * 64 * 3 / 8)  # three bits a weight
  measured = []

  def measure(choices):
    measured.append(choices.tobytes())
    return lost(choices)

  problem = make_problem((cap,))
  points = measure_front(problem, -LOSSES, measure, 1.0)
  assert len(set(measured)) == len(measured) == len(points)
  for point in points:
    assert cap.cost_model(problem.space, point.choices) <= cap.limit
