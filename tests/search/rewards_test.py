"""Rewards: hand-computed values, and what every reward must do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fliqs_jax.search.rewards import REWARDS


@pytest.mark.parametrize(
  ('name', 'quality', 'cost', 'target', 'beta', 'expected'),
  [
    ('absolute', 0.9, 15.0, 10.0, 1.0, 0.4),  # 0.9 - |1.5 - 1|
    ('absolute', 0.9, 5.0, 10.0, 1.0, 0.4),  # the same from below
    ('absolute', 0.9, 5.0, 10.0, 0.5, 0.65),
    ('absolute', -2.0, 12.0, 10.0, 2.0, -2.4),  # minus a loss as the quality
    ('one_sided_absolute', 0.9, 15.0, 10.0, 1.0, 0.4),
    ('one_sided_absolute', 0.9, 5.0, 10.0, 1.0, 0.9),
    ('one_sided_absolute', -2.0, 30.0, 10.0, 0.5, -3.0),
    ('soft_exponential', 0.8, 20.0, 10.0, -1.0, 0.4),  # 0.8 · 2^-1
    ('soft_exponential', 0.8, 5.0, 10.0, -1.0, 1.6),  # below the target it gains
    ('soft_exponential', 0.9, 40.0, 10.0, -0.5, 0.45),  # 0.9 / sqrt(4)
    ('hard_exponential', 0.8, 20.0, 10.0, -1.0, 0.4),
    ('hard_exponential', 0.8, 5.0, 10.0, -1.0, 0.8),
    ('hard_exponential', 0.9, 40.0, 10.0, -0.5, 0.45),
  ],
)
def test_values_by_hand(name, quality, cost, target, beta, expected):
  actual = REWARDS[name].function(quality, cost, target, beta)
  assert float(actual) == pytest.approx(expected, rel=1e-6)


def test_rewards_are_those_of_the_paper_and_its_alternatives():
  signs = {name: (r.beta_sign, r.signed_quality) for name, r in REWARDS.items()}
  assert signs == {
    'absolute': (1, True),
    'one_sided_absolute': (1, True),
    'soft_exponential': (-1, False),
    'hard_exponential': (-1, False),
  }


def _qualities(reward):
  return [0.0, 0.3, 1.0] + ([-2.5] if reward.signed_quality else [])


@pytest.mark.parametrize('name', REWARDS)
@pytest.mark.parametrize('magnitude', [0.07, 1.0, 3.0])
class TestEveryReward:
  def test_at_the_target_the_reward_is_the_quality(self, name, magnitude):
    reward = REWARDS[name]
    for quality in _qualities(reward):
      for target in (1e-3, 1.0, 116.9, 1e9):
        value = reward.function(quality, target, target, reward.beta_sign * magnitude)
        assert float(value) == pytest.approx(quality, rel=1e-6)

  def test_above_the_target_more_cost_never_raises_it(self, name, magnitude):
    reward, target = REWARDS[name], 7.5
    costs = jnp.asarray(target * np.geomspace(1, 16, 50), jnp.float32)
    for quality in _qualities(reward):
      values = np.asarray(
        reward.function(quality, costs, target, reward.beta_sign * magnitude)
      )
      assert (np.diff(values) <= 0).all()
      if quality > 0:
        assert values[-1] < values[0]

  def test_more_quality_never_lowers_it(self, name, magnitude):
    reward = REWARDS[name]
    qualities = jnp.linspace(-1.0 if reward.signed_quality else 0.0, 1.0, 21)
    for cost in (1.0, 10.0, 30.0):
      values = reward.function(qualities, cost, 10.0, reward.beta_sign * magnitude)
      assert (np.diff(np.asarray(values)) > 0).all()

  def test_only_the_ratio_of_cost_and_target_counts(self, name, magnitude):
    reward = REWARDS[name]
    beta = reward.beta_sign * magnitude
    for ratio in (0.5, 1.0, 1.7):
      small = reward.function(0.6, ratio * 4.0, 4.0, beta)
      large = reward.function(0.6, ratio * 4e8, 4e8, beta)
      assert float(small) == pytest.approx(float(large), rel=1e-5)

  def test_arrays_and_jit(self, name, magnitude):
    reward = REWARDS[name]
    beta = reward.beta_sign * magnitude
    rng = np.random.default_rng(0)
    quality = rng.uniform(0, 1, 8).astype(np.float32)
    cost = rng.uniform(1, 20, 8).astype(np.float32)
    together = jax.jit(lambda q, c: reward.function(q, c, 10.0, beta))(quality, cost)
    assert together.shape == (8,)
    for i in range(8):
      alone = reward.function(float(quality[i]), float(cost[i]), 10.0, beta)
      assert float(together[i]) == pytest.approx(float(alone), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize('name', ['one_sided_absolute', 'hard_exponential'])
def test_one_sided_rewards_are_flat_below_the_target(name):
  reward = REWARDS[name]
  costs = jnp.linspace(0.1, 10.0, 20)
  values = reward.function(0.7, costs, 10.0, float(reward.beta_sign))
  np.testing.assert_allclose(values, 0.7, rtol=1e-6)


def test_the_absolute_reward_is_largest_at_the_target():
  costs = np.float32(np.linspace(1, 19, 37))
  values = REWARDS['absolute'].function(0.7, costs, 10.0, 1.0)
  assert costs[np.argmax(values)] == 10.0
