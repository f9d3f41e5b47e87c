"""Measured swaps, against all assignments of a small space."""

import itertools

import numpy as np
import pytest

from fliqs_jax.layers.layer import Layer
from fliqs_jax.search.budget import Budget
from fliqs_jax.search.cost_models import get_cost_model
from fliqs_jax.search.measured_swaps import Measured, refine
from fliqs_jax.search.space import build_space
from fliqs_jax.search.strategies.problem import Problem

FORMATS = ('int2', 'int4', 'int8')


def _problem(num_layers):
  layers = [
    Layer(f'layer{i}', 'dot_general', 'dense', (1, 8), (8, 8), (1, 8), 64 + i, 64)
    for i in range(num_layers)
  ]
  space, bops = build_space(layers, FORMATS), get_cost_model('bops')
  target = Budget(bops, bops.uniform(layers, 'int4'))
  return Problem(space, target, (), 1, 0, 1, 0, 'cosine')


def _saturating(seed, num_layers):
  """A quality that falls with noises which multiply, as far from an optimum."""
  rng = np.random.default_rng(seed)
  noise = np.exp(rng.normal(size=(num_layers, 1))) * np.array([1.0, 0.2, 0.01])
  pairs = rng.uniform(0, 1, size=(num_layers, num_layers))

  def quality(choices):
    of_layers = noise[np.arange(num_layers), choices]
    return float(np.exp(-of_layers.sum() - of_layers @ pairs @ of_layers))

  return quality


@pytest.mark.parametrize('seed', range(8))
def test_swaps_are_within_the_budget_and_near_the_best(seed):
  problem, quality = _problem(5), _saturating(seed, 5)
  measured = []

  def measure(candidates):
    measured.extend(candidates)
    return np.array([quality(c) for c in candidates])

  uniform = np.ones(5, np.int32)
  start = Measured(uniform, quality(uniform), quality(uniform))
  best = refine(problem, measure, start, rounds=3)
  costs = lambda c: problem.target.cost_model(problem.space, c)
  assert costs(best.choices) <= problem.target.limit
  assert best.quality == quality(best.choices) >= start.quality
  every = [np.array(c, np.int32) for c in itertools.product(range(3), repeat=5)]
  within = [quality(c) for c in every if costs(c) <= problem.target.limit]
  assert best.quality >= start.quality + 0.8 * (max(within) - start.quality)
  assert len(measured) <= 3 * (10 + 6)


def test_without_a_round_nothing_is_measured():
  start = Measured(np.ones(5, np.int32), 1.0, 1.0)
  assert refine(_problem(5), None, start, rounds=0) is start


def test_an_assignment_that_is_not_finite_is_not_taken():
  problem, uniform = _problem(3), np.ones(3, np.int32)

  def measure(candidates):
    return np.array([1.0 if (c == 1).all() else np.nan for c in candidates])

  best = refine(problem, measure, Measured(uniform, 1.0, 1.0), rounds=2)
  np.testing.assert_array_equal(best.choices, uniform)
