"""Strategies in a simulation of the search, against the exact optimum of the problem.

The quality is a sum over decisions, with interactions of neighbours, weights that
drift while they are measured, and noise of the examples that all samples share.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fliqs_jax.errors import ConfigError
from fliqs_jax.layers.layer import Layer
from fliqs_jax.search.budget import Budget, fits
from fliqs_jax.search.controller import Outcome
from fliqs_jax.search.cost_models import get_cost_model
from fliqs_jax.search.space import build_space
from fliqs_jax.search.strategies import STRATEGIES
from fliqs_jax.search.strategies.actor_critic import (
  expected_costs,
  stratified_samples,
)
from fliqs_jax.search.strategies.problem import Problem

OPTIONS = ('int2', 'int3', 'int4', 'int8')
SIZES = np.random.default_rng(0).lognormal(0.0, 0.7, 12)
ERRORS = np.array([1.0, 0.3, 0.08, 0.0])
STEPS = 60
UNIFORM = OPTIONS.index('int3')
MEASURING = [name for name, s in STRATEGIES.items() if s.commit_step == 0.35]


def make_problem(num_layers=12, options=OPTIONS, scale=1.0, **changes):
  layers = [
    Layer(f'layer{i}', 'op', 'dense', (1, 8), (8, 8), (1, 8), int(1e6 * size), 64)
    for i, size in enumerate(SIZES[:num_layers])
  ]
  cost_model = get_cost_model('bops')
  space = build_space(layers, options)
  target = scale * cost_model.uniform(tuple(layers), 'int3')
  problem = Problem(
    space=space,
    target=Budget(cost_model, target),
    caps=(),
    num_samples=4,
    policy_delay=10,
    commit_step=10 + STEPS,
    seed=0,
    entropy_schedule='cosine',
  )
  return problem._replace(**changes)


@functools.cache
def simulation(name):
  """Returns the jitted function from (sensitivities, key) to the last state."""
  controller = STRATEGIES[name].build(make_problem())

  def quality(choices, sensitivities, drift):
    lost = sensitivities * jnp.asarray(ERRORS)[choices]  # [S, N]
    together = jnp.sum(jnp.sqrt(lost[:, 1:] * lost[:, :-1] + 1e-12), axis=1)
    return -drift * (jnp.sum(lost, axis=1) + 0.02 * together)

  def step(carry, step):
    state, sensitivities, key = carry
    sample_key, data_key, noise_key = jax.random.split(jax.random.fold_in(key, step), 3)
    choices = controller.sample(state, jax.random.split(sample_key, 4))
    qualities = quality(choices, sensitivities, 0.5 + 0.5 * (step - 10) / STEPS)
    qualities += 0.3 * jax.random.normal(data_key)  # of the examples
    qualities += 0.01 * jax.random.normal(noise_key, (4,))
    outcome = Outcome(choices, qualities, jnp.zeros(4), controller.is_measured(step))
    state, _ = controller.update(state, outcome, step)
    return (state, sensitivities, key), None

  @jax.jit
  def run(sensitivities, key):
    carry = controller.init(), sensitivities, key
    (state, *_), _ = jax.lax.scan(step, carry, 10 + jnp.arange(STEPS))
    return controller.scores(state)

  return run


def regrets(name, seed):
  """Returns the regret of a strategy, and that of the uniform model."""
  problem = make_problem()
  rng = np.random.default_rng(seed)
  sensitivities = rng.lognormal(0.0, 1.0, len(SIZES))
  sensitivities *= 0.5 / sensitivities.sum()
  scores = simulation(name)(jnp.float32(sensitivities), jax.random.key(seed))
  found = problem.best_choices(scores)
  assert fits(problem.space, found, [problem.target])
  worth = -sensitivities[:, None] * ERRORS
  value = lambda choices: worth[np.arange(len(worth)), choices].sum()
  best = value(problem.best_choices(worth))
  return best - value(found), best - value(np.full(len(worth), UNIFORM))


def test_regret_is_a_fraction_of_that_of_the_uniform_model():
  found, uniform = np.array([regrets('actor_critic', seed) for seed in range(40)]).T
  assert (found >= -1e-9).all()
  assert (found < uniform + 0.01).all()
  assert found.mean() < 0.2 * uniform.mean()


def test_policies_of_several_targets_learn_from_the_same_measurements():
  problem = make_problem()
  cost_model, limit = problem.target
  limits = 0.8 * limit, limit, 1.6 * limit
  own = [
    problem._replace(shared_limits=limits, target=Budget(cost_model, one))
    for one in limits
  ]
  controllers = [STRATEGIES['actor_critic'].build(p) for p in own]
  state, update = controllers[0].init(), jax.jit(controllers[0].update)
  sample = jax.jit(controllers[0].sample)
  worth = -SIZES[:, None] * ERRORS
  value = lambda choices: worth[np.arange(12), choices].sum(axis=-1)
  costs = []
  for step in range(10, 10 + STEPS):
    choices = sample(state, jax.random.split(jax.random.key(step), 4))
    costs += [*cost_model(problem.space, np.asarray(choices))]
    qualities = jnp.float32(value(np.asarray(choices)))
    outcome = Outcome(choices, qualities, jnp.ones(4), jnp.bool_(True))
    state, _ = update(state, outcome, jnp.int32(step))
  # The samples follow the policies of the targets in turn.
  late = [np.mean(costs[-60 + turn :: 3]) for turn in range(3)]
  assert late[0] < late[1] < late[2]
  per_option = np.array([
    cost_model.per_layer(problem.space, np.full((1, 12), option, np.int32))[0]
    for option in range(4)
  ]).T  # fmt: skip
  for p, controller in zip(own, controllers):
    policy = np.asarray(controller.policy(state))
    assert (policy * per_option).sum() == pytest.approx(p.target.limit, rel=0.02)
    found, best = p.best_choices(controller.scores(state)), p.best_choices(worth)
    assert value(found) == pytest.approx(value(best), abs=0.02)


def test_measuring_each_option_alone_is_not_better():
  seeds = range(20)
  ours, theirs = (
    np.mean([regrets(name, seed)[0] for seed in seeds])
    for name in ('actor_critic', 'sensitivity')
  )
  assert ours < theirs


@pytest.mark.parametrize('seed', range(3))
def test_samples_follow_the_policy_evenly(seed):
  rng = np.random.default_rng(seed)
  policy = rng.dirichlet(np.ones(4), size=5).astype(np.float32)
  policy[0] = [0.0, 0.5, 0.5, 0.0]
  draw = jax.jit(lambda key: stratified_samples(policy, jax.random.split(key, 4)))
  keys = jax.random.split(jax.random.key(seed), 2000)
  samples = np.asarray(jax.vmap(draw)(keys))  # [2000, S, N]
  counts = np.eye(4)[samples]
  for sample in range(4):  # each is distributed as the policy
    np.testing.assert_allclose(counts[:, sample].mean(0), policy, atol=0.05)
  # An option holds whole quarters of the distribution, and a part of two at its ends.
  assert (np.abs(counts.sum(axis=1) - 4 * policy) < 2).all()
  independent = 4 * policy * (1 - policy)
  assert counts.sum(axis=1).var(axis=0).sum() < 0.7 * independent.sum()


def test_expected_costs_are_exact_where_costs_add_up():
  problem = make_problem(num_layers=5)
  space, target = problem.space, problem.target
  rng = np.random.default_rng(0)
  choices = jnp.asarray(rng.integers(4, size=(4, 5)), jnp.int32)
  costs = np.asarray(expected_costs(space, target.cost_model, target.limit, choices))
  policy = rng.dirichlet(np.ones(4), size=5)
  everything = np.array(list(itertools.product(range(4), repeat=5)), np.int32)
  probabilities = policy[np.arange(5), everything].prod(axis=1)
  exact = probabilities @ target.cost_model(space, everything) / target.limit
  assert (policy * costs).sum() == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize('name', [*MEASURING, 'uniform'])
def test_every_strategy_is_a_controller(name):
  few = ('int2', 'int3', 'int8')
  problem = make_problem(num_layers=4, options=few)
  controller = STRATEGIES[name].build(problem)
  state = controller.init()
  keys = jax.random.split(jax.random.key(0), 4)
  update = jax.jit(controller.update)
  for step in range(10, 30):
    choices = controller.sample(state, keys)
    assert choices.shape == (4, 4) and choices.dtype == jnp.int32
    assert (choices >= 0).all() and (choices < 3).all()
    outcome = Outcome(choices, -jnp.sum(choices, 1) / 9.0, jnp.ones(4), step != 20)
    state, metrics = update(state, outcome, jnp.int32(step))
    assert np.isfinite(metrics['reward'])
  policy = controller.policy(state)
  np.testing.assert_allclose(policy.sum(axis=1), np.ones(4), rtol=1e-5)
  chosen = problem.best_choices(controller.scores(state))
  assert fits(problem.space, chosen, [problem.target])
  committed = controller.commit(state, jnp.asarray(chosen))
  np.testing.assert_array_equal(controller.final_choices(committed), chosen)
  np.testing.assert_array_equal(
    controller.sample(committed, keys), np.tile(chosen, (4, 1))
  )


def test_what_is_not_measured_changes_nothing():
  for name in MEASURING:
    controller = STRATEGIES[name].build(make_problem(4, ('int2', 'int8')))
    state = controller.init()
    outcome = Outcome(jnp.ones((4, 4), jnp.int32), jnp.ones(4), jnp.ones(4), False)
    new, _ = controller.update(state, outcome, jnp.int32(12))
    jax.tree.map(np.testing.assert_array_equal, new, state)


def test_exhaustive_finds_the_best_assignment():
  problem = make_problem(num_layers=3, options=('int2', 'int3', 'int8'))
  controller = STRATEGIES['exhaustive'].build(problem)
  worth = np.array([[-3.0, -1.0, 0.0], [-1.0, -0.2, 0.0], [-2.0, -0.1, 0.0]])
  state, update = controller.init(), jax.jit(controller.update)
  for step in range(60):
    choices = controller.sample(state, None)
    qualities = jnp.float32(worth[np.arange(3), np.asarray(choices)].sum(axis=1))
    outcome = Outcome(choices, qualities + step, jnp.ones(4), True)
    state, _ = update(state, outcome, jnp.int32(step))
  np.testing.assert_array_equal(
    problem.best_choices(controller.scores(state)), problem.best_choices(worth)
  )


def test_uniform_is_the_widest_within_the_budget():
  problem = make_problem(scale=1.5)
  controller = STRATEGIES['uniform'].build(problem)
  choices = problem.best_choices(controller.scores(()))
  np.testing.assert_array_equal(choices, np.full(len(SIZES), UNIFORM))


@pytest.mark.parametrize(
  'name, changes, expected',
  [
    ('exhaustive', {}, '4096 assignments or fewer'),
    ('sensitivity', {'commit_step': 12}, '36 changes are to be measured'),
  ],
)
def test_what_cannot_be_searched_is_named(name, changes, expected):
  with pytest.raises(ConfigError, match=expected):
    STRATEGIES[name].build(make_problem(**changes))
