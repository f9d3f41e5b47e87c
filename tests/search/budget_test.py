"""Budgets against brute force over all choices of small spaces."""

import itertools

import numpy as np
import pytest

from fliqs_jax.layers.layer import Layer
from fliqs_jax.search import devices
from fliqs_jax.search import space as search_space
from fliqs_jax.search.budget import (
  Budget,
  cost_range,
  fits,
  lowest_within,
  marginals,
  most_likely_within,
)
from fliqs_jax.search.cost_models import COST_MODELS, CostModel, get_cost_model

WITHOUT_FILES = tuple(name for name in COST_MODELS if name != 'latency_table')
OPTIONS = ('int2', 'int3', 'int4', 'e2m1', 'int8', 'bf16')
MIXED = ('e2m1', 'int4', 'e4m3', 'int8')


def _space(seed, operands='tied', num_layers=5, round_macs=False, options=OPTIONS):
  """A space of layers of random sizes, decisions with different numbers of options."""
  rng = np.random.default_rng(seed)
  layers = []
  for i in range(num_layers):
    macs = 1000 * int(rng.integers(1, 9)) if round_macs else int(rng.integers(1, 10**6))
    shape = tuple(map(int, rng.integers(1, 9, 2)))
    inputs, outputs = ((1, int(n)) for n in rng.integers(1, 999, 2))
    layers.append(
      Layer(f'layer{i}', 'op', 'dense', inputs, shape, outputs, macs, 0)
    )
  space = search_space.build_space(layers, options, operands)
  decisions = tuple(
    decision._replace(
      options=tuple(rng.permutation(options)[: rng.integers(1, len(options))].tolist())
    )
    for decision in space.decisions
  )
  return search_space.SearchSpace(
    space.layers, decisions, space.weights, space.activations
  )


def _all_choices(space):
  sizes = space.valid.sum(axis=1)
  return np.array(list(itertools.product(*map(range, sizes))), np.int32)


def _log_policy(space, seed, sharpness=3.0):
  """Log-policy whose padding holds numbers that look like the likeliest."""
  logits = np.random.default_rng(seed).normal(0, sharpness, space.valid.shape)
  masked = np.where(space.valid, logits, -np.inf)
  log_policy = masked - np.log(np.exp(masked).sum(axis=1, keepdims=True))
  return np.where(space.valid, log_policy, 7.0)


def _likelihood(log_policy, choices):
  return log_policy[np.arange(len(log_policy)), choices].sum(axis=-1)


def _check_choices(space, choices):
  assert choices.dtype == np.int32 and choices.shape == (len(space.decisions),)
  assert space.valid[np.arange(len(choices)), choices].all()


@pytest.mark.parametrize('cost_name', WITHOUT_FILES)
@pytest.mark.parametrize('operands', search_space.SEARCHED_OPERANDS)
def test_cost_range_equals_brute_force(cost_name, operands):
  model = get_cost_model(cost_name)
  for seed in range(20):
    space = _space(seed, operands, num_layers=2 if operands == 'separate' else 4)
    costs = model(space, _all_choices(space))
    low, high = cost_range(space, model)
    assert low == pytest.approx(costs.min(), rel=1e-12)
    assert high == pytest.approx(costs.max(), rel=1e-12)


@pytest.mark.parametrize('device', devices.DEVICES)
def test_cost_range_of_several_families_of_formats(device):
  # The best format of a layer's weights depends on that of its activations.
  model = get_cost_model('roofline', device=device)
  for seed in range(10):
    space = _space(seed, 'separate', num_layers=2, options=MIXED)
    costs = model(space, _all_choices(space))
    low, high = cost_range(space, model)
    assert low == pytest.approx(costs.min(), rel=1e-12)
    assert high == pytest.approx(costs.max(), rel=1e-12)


def test_which_costs_are_sums_over_decisions():
  bops, size = get_cost_model('bops'), get_cost_model('model_size')
  layers = _space(0).layers
  additive = {
    (model.name, operands): marginals(
      search_space.build_space(layers, OPTIONS, operands), model
    ).additive
    for model in (bops, size)
    for operands in search_space.SEARCHED_OPERANDS
  }
  assert additive == {
    ('bops', 'tied'): True,
    ('bops', 'separate'): False,  # bits times bits
    ('bops', 'weights'): True,
    ('bops', 'pairs'): True,  # one decision a layer
    ('model_size', 'tied'): True,
    ('model_size', 'pairs'): True,
    ('model_size', 'separate'): True,
    ('model_size', 'weights'): True,
  }


def test_marginals_are_single_changes():
  space, bops = _space(3), get_cost_model('bops')
  costs = marginals(space, bops)
  first = np.zeros(len(space.decisions), np.int32)
  assert costs.base == bops(space, first)
  for i, decision in enumerate(space.decisions):
    for k in range(space.valid.shape[1]):
      changed = first.copy()
      if k < len(decision.options):
        changed[i] = k
        expected = bops(space, changed) - costs.base
        assert costs.changes[i, k] == pytest.approx(expected, rel=1e-12, abs=1e-15)
      else:
        assert costs.changes[i, k] == np.inf


def _targets(rng, costs):
  """Between the costs, at reachable ones exactly, at the lowest and the highest."""
  between = rng.uniform(costs.min(), costs.max(), 4)
  return [*between, *rng.choice(costs, 4), costs.min(), costs.max(), 2 * costs.max()]


def _check_against_brute_force(space, model, log_policy, rng):
  everything = _all_choices(space)
  costs = model(space, everything)
  likelihoods = _likelihood(log_policy, everything)
  for target in _targets(rng, costs):
    choices = most_likely_within(space, model, log_policy, float(target))
    _check_choices(space, choices)
    assert model(space, choices) <= target
    best = likelihoods[costs <= target].max()
    assert _likelihood(log_policy, choices) == pytest.approx(best, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize('cost_name', WITHOUT_FILES)
@pytest.mark.parametrize('operands', ['tied', 'weights'])
@pytest.mark.parametrize('round_macs', [False, True])
def test_the_likeliest_within_a_target_is_exact(cost_name, operands, round_macs):
  # Round sizes make many assignments cost the same, the target included.
  for seed in range(4):
    space = _space(seed, operands, round_macs=round_macs)
    _check_against_brute_force(
      space,
      get_cost_model(cost_name),
      _log_policy(space, seed),
      np.random.default_rng(seed),
    )


def test_a_cost_that_separates_is_solved_exactly_too():
  for seed in range(12):
    space = _space(seed, 'separate', num_layers=2)
    _check_against_brute_force(
      space,
      get_cost_model('model_size'),
      _log_policy(space, seed),
      np.random.default_rng(seed),
    )


def test_layers_tied_in_groups():
  for seed in range(12):
    layers = _space(seed, num_layers=7).layers
    space = search_space.build_space(
      layers, OPTIONS, groups=['layer[02]', 'layer[135]'], pins=[('layer6', 'int8')]
    )
    _check_against_brute_force(
      space,
      get_cost_model('bops'),
      _log_policy(space, seed),
      np.random.default_rng(seed),
    )


def test_a_cost_that_is_no_sum_stays_within_the_target():
  bops = get_cost_model('bops')
  for seed in range(15):
    space = _space(seed, 'separate', num_layers=3)
    log_policy, rng = _log_policy(space, seed), np.random.default_rng(seed)
    everything = _all_choices(space)
    costs = bops(space, everything)
    for target in _targets(rng, costs):
      choices = most_likely_within(space, bops, log_policy, float(target))
      _check_choices(space, choices)
      assert bops(space, choices) <= target
      # Greedy, but no single change is left that would be likelier and fit.
      for i, k in zip(*np.nonzero(space.valid), strict=True):
        changed = choices.copy()
        changed[i] = k
        if bops(space, changed) <= target:
          assert _likelihood(log_policy, changed) <= _likelihood(log_policy, choices)


CAPPED = [  # the cost with a target, the one with a cap
  ('bops', 'model_size'),
  ('model_size', 'activation_bytes'),
  ('roofline', 'peak_activation_bytes'),
  ('peak_activation_bytes', 'linear_compute'),
]


@pytest.mark.parametrize('names', CAPPED)
def test_the_likeliest_within_a_target_and_a_cap_is_exact(names):
  model, capped = map(get_cost_model, names)
  for seed in range(3):
    space, rng = _space(seed, num_layers=4), np.random.default_rng(seed)
    everything, log_policy = _all_choices(space), _log_policy(space, seed)
    costs, capped_costs = model(space, everything), capped(space, everything)
    likelihoods = _likelihood(log_policy, everything)
    for cap in _targets(rng, capped_costs):
      within = capped_costs <= cap
      caps = (Budget(capped, float(cap)),)
      lowest = lowest_within(space, model, caps)
      _check_choices(space, lowest)
      assert fits(space, lowest, caps)
      if model.combine == 'sum':
        assert model(space, lowest) == pytest.approx(costs[within].min(), rel=1e-6)
      for target in _targets(rng, costs[within])[2:]:
        choices = most_likely_within(space, model, log_policy, float(target), caps)
        _check_choices(space, choices)
        assert model(space, choices) <= target and capped(space, choices) <= cap
        best = likelihoods[within & (costs <= target)].max()
        assert _likelihood(log_policy, choices) == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize('names', [('bops', 'model_size'), ('roofline', 'bops')])
def test_costs_that_are_no_sums_stay_within_a_target_and_a_cap(names):
  model, capped = map(get_cost_model, names)
  for seed in range(8):
    space, rng = _space(seed, 'separate', num_layers=3), np.random.default_rng(seed)
    everything, log_policy = _all_choices(space), _log_policy(space, seed)
    costs, capped_costs = model(space, everything), capped(space, everything)
    low, high = capped_costs.min(), capped_costs.max()
    for cap in [low, *rng.uniform(low, high, 3), high]:
      caps = (Budget(capped, float(cap)),)
      reachable = model(space, lowest_within(space, model, caps))
      assert costs[capped_costs <= cap].min() <= reachable <= costs.max()
      for target in [reachable, *rng.uniform(reachable, costs.max(), 3)]:
        choices = most_likely_within(space, model, log_policy, float(target), caps)
        _check_choices(space, choices)
        assert model(space, choices) <= target and capped(space, choices) <= cap


def test_a_peak_is_bounded_layer_by_layer():
  # A sum over decisions in each layer, though their maximum is none.
  model = get_cost_model('peak_activation_bytes')
  for seed in range(12):
    space = _space(seed, 'separate', num_layers=2)
    rng, log_policy = np.random.default_rng(seed), _log_policy(space, seed)
    _check_against_brute_force(space, model, log_policy, rng)


def test_a_cost_that_falls_as_another_rises_stays_within_the_target():
  # One's best format is the other's worst: no single change from the start saves.
  def mismatch(layers):
    difference = layers.weight_bits - np.roll(layers.weight_bits, 1, axis=-1)
    return 1 + difference**2

  model = CostModel('mismatch', 'units', mismatch)
  options = ('int2', 'int8')
  space = search_space.build_space(_space(0, num_layers=4).layers, options)
  for seed in range(20):
    log_policy = _log_policy(space, seed)
    low, _ = cost_range(space, model)
    choices = most_likely_within(space, model, log_policy, low)
    assert model(space, choices) <= low


def test_without_a_conflict_it_is_the_argmax():
  bops = get_cost_model('bops')
  for seed in range(20):
    for operands in search_space.SEARCHED_OPERANDS:
      space = _space(seed, operands)
      log_policy = _log_policy(space, seed)
      argmax = np.argmax(np.where(space.valid, log_policy, -np.inf), axis=1)
      # Exactly what the argmax costs is within the budget.
      target = float(bops(space, argmax.astype(np.int32)))
      np.testing.assert_array_equal(
        most_likely_within(space, bops, log_policy, target), argmax
      )


@pytest.mark.parametrize('operands', ['tied', 'separate'])
def test_options_that_the_policy_ruled_out_can_still_meet_a_budget(operands):
  # The cheapest assignment has probability 0 in float32.
  bops = get_cost_model('bops')
  layers = _space(0).layers
  space = search_space.build_space(layers, ('int8', 'int2'), operands)
  log_policy = np.tile([0.0, -np.inf], (len(space.decisions), 1))
  low, _ = cost_range(space, bops)
  choices = most_likely_within(space, bops, log_policy, low)
  np.testing.assert_array_equal(choices, np.ones(len(space.decisions)))


def test_a_large_space_at_a_uniform_cost():
  # 60 layers in 6 formats; the uniform int4 model costs exactly the target, and the
  # bound of the relaxed problem shows how far any solution can be from the best.
  rng = np.random.default_rng(0)
  bops = get_cost_model('bops')
  layers = _space(5, num_layers=60).layers
  space = search_space.build_space(layers, OPTIONS)
  target = bops.uniform(layers, 'int4')
  for seed in range(5):
    log_policy = _log_policy(space, seed)
    choices = most_likely_within(space, bops, log_policy, target)
    assert bops(space, choices) <= target
    costs = np.stack(
      [
        bops.per_layer(space, np.full(len(layers), k, np.int32))
        for k in range(len(OPTIONS))
      ],
      axis=1,
    )
    # Lagrangian duality: an upper bound on the likelihood within the target.
    bound = min(
      (log_policy - price * costs).max(axis=1).sum() + price * target
      for price in np.concatenate([[0], np.geomspace(1e-3, 1e6, 2000)])
    )
    value = _likelihood(log_policy, choices)
    assert value <= bound + 1e-9
    # Rounding the relaxed solution changes one decision, and there are 60.
    assert bound - value < np.ptp(log_policy, axis=1).max()
    # No random pair of changes is better and fits.
    for _ in range(2000):
      changed = choices.copy()
      changed[rng.integers(60, size=2)] = rng.integers(len(OPTIONS), size=2)
      if _likelihood(log_policy, changed) > value + 1e-9:
        assert bops(space, changed) > target
