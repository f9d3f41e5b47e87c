"""The controller: its loss in float64, baselines and schedules by hand, convergence."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

from fliqs_jax.search import controller as controller_lib
from fliqs_jax.search import rewards as rewards_lib
from fliqs_jax.search.controller import (
  ENTROPY_SCHEDULES,
  entropy_weight,
  policy_entropy,
  policy_gradient_controller,
)

# Decisions with 4, 2, 1 and 3 options.
VALID = np.arange(4) < np.array([4, 2, 1, 3])[:, None]
ALL_VALID = np.ones((3, 4), bool)


def _constant(value):
  return lambda step: jnp.float32(value)


def _quality(qualities, costs):
  """The reward that leaves the cost aside."""
  del costs
  return qualities


def _outcome(choices, rewards):
  return controller_lib.Outcome(choices, rewards, jnp.zeros_like(rewards))


def _with_logits(controller, logits):
  return controller.init()._replace(logits=jnp.asarray(logits, jnp.float32))


def _keys(seed, count):
  return jax.random.split(jax.random.key(seed), count)


# The loss, in float64


def _log_policy(logits, valid):
  logits = np.where(valid, logits, -np.inf)
  largest = logits.max(axis=1, keepdims=True)
  return logits - largest - np.log(np.exp(logits - largest).sum(axis=1, keepdims=True))


def _loss(logits, valid, choices, advantages, weight):
  """`L(θ)` as the paper writes it."""
  log_policy = _log_policy(logits, valid)
  likelihood = [
    np.mean([log_policy[i, k] for i, k in enumerate(sample)]) for sample in choices
  ]
  finite = np.where(valid, log_policy, 0.0)
  entropy = -(np.exp(log_policy) * finite).sum(axis=1)
  return -np.mean(np.asarray(advantages) * likelihood) + weight * entropy.mean()


def _finite_difference(function, x, h=1e-5):
  gradient = np.zeros_like(x)
  for index in np.ndindex(*x.shape):
    step = np.zeros_like(x)
    step[index] = h
    gradient[index] = (function(x + step) - function(x - step)) / (2 * h)
  return gradient


def _gradient_of(state):
  """The gradient of Adam's first update, `m = (1 − 0.9) · g`."""
  return np.asarray(state.opt_state[0].mu, np.float64) / 0.1


def _advantages(baseline, rewards, moving):
  if baseline == 'moving':
    return rewards - moving
  return np.array([r - np.delete(rewards, s).mean() for s, r in enumerate(rewards)])


@pytest.mark.parametrize('valid', [VALID, ALL_VALID], ids=['padded', 'full'])
@pytest.mark.parametrize('baseline', controller_lib.BASELINES)
@pytest.mark.parametrize('weight', [0.0, 0.1, 2.0])
def test_the_gradient_is_that_of_the_papers_loss(valid, baseline, weight):
  momentum, samples = 0.95, 5
  controller = policy_gradient_controller(
    valid, _quality, _constant(weight), baseline=baseline, baseline_momentum=momentum
  )
  update = jax.jit(controller.update)
  for seed in range(20):
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, valid.shape).astype(np.float32)
    choices = rng.integers(valid.sum(axis=1), size=(samples, len(valid))).astype(
      np.int32
    )
    rewards = rng.normal(0.5, 1, samples).astype(np.float32)
    old = rng.normal()
    state = _with_logits(controller, logits)._replace(
      baseline=jnp.float32(old), num_rewards=jnp.int32(3)
    )
    new_state, _ = update(state, _outcome(choices, rewards), 0)
    moving = momentum * old + (1 - momentum) * rewards.mean()
    advantages = _advantages(baseline, rewards.astype(np.float64), moving)
    expected = _finite_difference(
      functools.partial(
        _loss, valid=valid, choices=choices, advantages=advantages, weight=weight
      ),
      logits.astype(np.float64),
    )
    actual = _gradient_of(new_state)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=2e-6)
    # Decisions without an alternative, and options that do not exist, do not move.
    still = ~valid | (valid.sum(axis=1, keepdims=True) == 1)
    np.testing.assert_array_equal(np.asarray(new_state.logits)[still], logits[still])


def test_logits_follow_adam():
  learning_rate, weight, rng = 0.03, 0.2, np.random.default_rng(0)
  controller = policy_gradient_controller(
    VALID, _quality, _constant(weight), learning_rate
  )
  adam = optax.adam(learning_rate)
  # Not at the uniform policy, where gradients may vanish and Adam scales up roundings.
  logits = rng.normal(size=VALID.shape)
  state = _with_logits(controller, logits)
  adam_state = adam.init(jnp.asarray(logits, jnp.float32))
  update = jax.jit(controller.update)
  for step in range(5):
    choices = rng.integers(VALID.sum(axis=1), size=(3, len(VALID))).astype(np.int32)
    rewards = rng.normal(size=3).astype(np.float32)
    advantages = _advantages('leave_one_out', rewards.astype(np.float64), None)
    gradient = _finite_difference(
      functools.partial(
        _loss, valid=VALID, choices=choices, advantages=advantages, weight=weight
      ),
      logits,
    )
    # Rounding noise of a difference would be a step of Adam's, of whatever size.
    gradient[np.abs(gradient) < 1e-8] = 0
    updates, adam_state = adam.update(jnp.asarray(gradient, jnp.float32), adam_state)
    logits = logits + np.asarray(updates, np.float64)
    state, _ = update(state, _outcome(choices, rewards), step)
    np.testing.assert_allclose(state.logits, logits, rtol=1e-3, atol=1e-5)


def test_better_choices_become_likelier():
  controller = policy_gradient_controller(ALL_VALID, _quality, _constant(0.0))
  choices = np.array([[0, 1, 2], [3, 3, 3]], np.int32)
  state, _ = controller.update(
    controller.init(), _outcome(choices, np.float32([1.0, 0.0])), 0
  )
  policy = np.asarray(controller.policy(state))
  assert (policy[[0, 1, 2], [0, 1, 2]] > 0.25).all() and (policy[:, 3] < 0.25).all()


def test_the_penalty_lowers_entropy():
  logits = np.random.default_rng(0).normal(size=ALL_VALID.shape)
  controller = policy_gradient_controller(ALL_VALID, _quality, _constant(1.0))
  state = _with_logits(controller, logits)
  # Equal rewards: no advantage, the penalty alone.
  choices = np.zeros((2, 3), np.int32)
  new_state, _ = controller.update(state, _outcome(choices, np.ones(2, np.float32)), 0)
  before = np.asarray(policy_entropy(state.logits, ALL_VALID))
  after = np.asarray(policy_entropy(new_state.logits, ALL_VALID))
  assert (after < before).all()


# Baselines


def test_moving_baseline_by_hand():
  controller = policy_gradient_controller(
    ALL_VALID, _quality, _constant(0.0), baseline='moving', baseline_momentum=0.9
  )
  state, choices = controller.init(), np.zeros((2, 3), np.int32)
  # The first rewards themselves; 0.9 · 2 + 0.1 · 4; 0.9 · 2.2 + 0.1 · (-1).
  for step, (rewards, expected) in enumerate(
    [([1, 3], 2.0), ([4, 4], 2.2), ([-2, 0], 1.88)]
  ):
    state, metrics = controller.update(
      state, _outcome(choices, np.float32(rewards)), step
    )
    assert float(state.baseline) == pytest.approx(expected, rel=1e-6)
    assert float(metrics['baseline']) == pytest.approx(expected, rel=1e-6)
    assert state.num_rewards == step + 1


def test_moving_baseline_with_one_sample():
  controller = policy_gradient_controller(
    ALL_VALID, _quality, _constant(0.0), baseline='moving', baseline_momentum=0.5
  )
  choices = np.array([[1, 2, 3]], np.int32)
  state, _ = controller.update(
    controller.init(), _outcome(choices, np.float32([0.7])), 0
  )
  # The first reward is its own baseline.
  np.testing.assert_array_equal(state.logits, np.zeros(ALL_VALID.shape))
  state = controller.init()._replace(baseline=jnp.float32(1), num_rewards=jnp.int32(1))
  state, _ = controller.update(state, _outcome(choices, np.float32([2.0])), 1)
  # A = 2 − 1.5; ∂L/∂θ_ik = −A · (1[k chosen] − 1/4) / 3.
  expected = -0.5 * (np.eye(4)[[1, 2, 3]] - 0.25) / 3
  np.testing.assert_allclose(_gradient_of(state), expected, rtol=1e-6)


def test_rewards_are_of_quality_and_cost():
  reward = functools.partial(rewards_lib.absolute, target=4.0, beta=2.0)
  controller = policy_gradient_controller(ALL_VALID, reward, _constant(0.0))
  outcome = controller_lib.Outcome(
    choices=np.zeros((2, 3), np.int32),
    qualities=np.float32([0.5, 0.7]),
    costs=np.float32([6.0, 4.0]),
  )
  state, metrics = controller.update(controller.init(), outcome, 0)
  # 0.5 − 2 · |6/4 − 1| and 0.7 − 2 · |4/4 − 1|.
  assert float(metrics['reward']) == pytest.approx((-0.5 + 0.7) / 2, rel=1e-6)
  assert float(state.baseline) == float(metrics['reward'])


def test_leave_one_out_by_hand():
  controller = policy_gradient_controller(ALL_VALID[:1], _quality, _constant(0.0))
  choices = np.array([[0], [1], [2]], np.int32)
  state, _ = controller.update(
    controller.init(), _outcome(choices, np.float32([1.0, 2.0, 6.0])), 0
  )
  # 1 − 4, 2 − 3.5, 6 − 1.5, which sum to 0; hence −A_k / 3 for each option chosen.
  expected = -np.array([[-3.0, -1.5, 4.5, 0.0]]) / 3
  np.testing.assert_allclose(_gradient_of(state), expected, rtol=1e-6, atol=1e-7)


# Schedules and delays


@pytest.mark.parametrize(
  ('schedule', 'fractions'),
  [
    # Before the policy starts, at its start, a quarter, half, at and past the end.
    ('cosine', [0, 0, 0.5 * (1 - np.sqrt(0.5)), 0.5, 1, 1]),
    ('linear', [0, 0, 0.25, 0.5, 1, 1]),
    ('constant', [1, 1, 1, 1, 1, 1]),
    ('step', [0, 0, 0, 1, 1, 1]),
  ],
)
def test_entropy_schedules_by_hand(schedule, fractions):
  weight = entropy_weight(schedule, 0.3, policy_delay=200, num_steps=1000)
  for step, fraction in zip([0, 200, 400, 600, 1000, 1500], fractions, strict=True):
    assert float(weight(step)) == pytest.approx(0.3 * fraction, rel=1e-5, abs=1e-7)
    assert float(jax.jit(weight)(jnp.int32(step))) == pytest.approx(
      0.3 * fraction, rel=1e-5, abs=1e-7
    )


@pytest.mark.parametrize('schedule', ENTROPY_SCHEDULES)
def test_every_schedule_rises_to_its_end_value(schedule):
  weight = entropy_weight(schedule, 0.1, policy_delay=25, num_steps=100)
  values = np.array([float(weight(step)) for step in range(0, 130, 5)])
  assert (np.diff(values) >= -1e-8).all() and (values >= 0).all()
  assert values[-1] == pytest.approx(0.1, rel=1e-6)
  assert values[100 // 5] == pytest.approx(0.1, rel=1e-6)


@pytest.mark.parametrize('schedule', ENTROPY_SCHEDULES)
def test_a_schedule_without_steps_is_finite(schedule):
  weight = entropy_weight(schedule, 0.1, policy_delay=10, num_steps=10)
  assert np.isfinite([float(weight(step)) for step in (0, 10, 11)]).all()


def test_the_update_takes_the_weight_of_its_step():
  weight = entropy_weight('linear', 1.0, policy_delay=0, num_steps=10)
  controller = policy_gradient_controller(ALL_VALID, _quality, weight)
  logits = np.random.default_rng(0).normal(size=ALL_VALID.shape)
  state = _with_logits(controller, logits)
  choices, rewards = np.zeros((2, 3), np.int32), np.ones(2, np.float32)
  full = _gradient_of(controller.update(state, _outcome(choices, rewards), 10)[0])
  for step in (0, 3, 5):
    new_state, metrics = controller.update(state, _outcome(choices, rewards), step)
    assert float(metrics['entropy_weight']) == pytest.approx(step / 10)
    np.testing.assert_allclose(
      _gradient_of(new_state), step / 10 * full, rtol=1e-5, atol=1e-8
    )


def test_only_the_baseline_moves_before_the_policy_starts():
  controller = policy_gradient_controller(
    VALID, _quality, _constant(0.5), policy_delay=3
  )
  state = _with_logits(controller, np.random.default_rng(0).normal(size=VALID.shape))
  update, rng = jax.jit(controller.update), np.random.default_rng(1)
  for step in range(5):
    choices = rng.integers(VALID.sum(axis=1), size=(2, len(VALID))).astype(np.int32)
    new_state, _ = update(
      state, _outcome(choices, rng.normal(size=2).astype(np.float32)), step
    )
    same = [
      np.array_equal(a, b)
      for a, b in zip(
        jax.tree.leaves((state.logits, state.opt_state)),
        jax.tree.leaves((new_state.logits, new_state.opt_state)),
        strict=True,
      )
    ]
    assert all(same) if step < 3 else not any(same)
    assert new_state.baseline != state.baseline
    assert new_state.num_rewards == step + 1
    state = new_state


def test_commitment_overrides_the_policy_and_stops_it():
  controller = policy_gradient_controller(VALID, _quality, _constant(0.5))
  logits = np.random.default_rng(0).normal(size=VALID.shape)
  commitment = np.array([3, 0, 0, 1], np.int32)
  free = _with_logits(controller, logits)
  state = controller.commit(free, jnp.asarray(commitment))
  choices = jax.jit(controller.sample)(state, _keys(0, 50))
  np.testing.assert_array_equal(choices, np.tile(commitment, (50, 1)))
  np.testing.assert_array_equal(controller.final_choices(state), commitment)
  likeliest = np.where(VALID, logits, -np.inf).argmax(axis=1)
  np.testing.assert_array_equal(controller.final_choices(free), likeliest)
  np.testing.assert_array_equal(controller.policy(state), controller.policy(free))
  rewards = np.random.default_rng(1).normal(size=50).astype(np.float32)
  new_state, _ = jax.jit(controller.update)(state, _outcome(choices, rewards), 10)
  for a, b in zip(
    jax.tree.leaves((state.logits, state.opt_state, state.commitment)),
    jax.tree.leaves((new_state.logits, new_state.opt_state, new_state.commitment)),
    strict=True,
  ):
    np.testing.assert_array_equal(a, b)
  assert float(new_state.baseline) == pytest.approx(float(rewards.mean()), rel=1e-5)


# Sampling


def test_the_initial_policy_is_uniform_over_what_exists():
  controller = policy_gradient_controller(VALID, _quality, _constant(0.0))
  state = controller.init()
  policy = np.asarray(controller.policy(state))
  np.testing.assert_allclose(
    policy, VALID / VALID.sum(axis=1, keepdims=True), rtol=1e-6
  )
  np.testing.assert_array_equal(state.commitment, [-1] * 4)


@pytest.mark.parametrize('seed', range(3))
def test_samples_follow_the_policy(seed):
  controller = policy_gradient_controller(VALID, _quality, _constant(0.0))
  logits = np.random.default_rng(seed).normal(0, 1, VALID.shape)
  state = _with_logits(controller, np.where(VALID, logits, 50.0))
  count = 20_000
  choices = np.asarray(jax.jit(controller.sample)(state, _keys(seed, count)))
  assert choices.shape == (count, 4) and choices.dtype == np.int32
  policy = np.exp(_log_policy(logits, VALID))
  np.testing.assert_allclose(controller.policy(state), policy, rtol=1e-5)
  for i in range(4):
    exists = VALID[i]
    counts = np.bincount(choices[:, i], minlength=4)
    assert counts[~exists].sum() == 0
    if exists.sum() > 1:
      p_value = stats.chisquare(counts[exists], count * policy[i, exists]).pvalue
      assert p_value > 1e-4
  # Decisions are independent: a table of two has the products of their margins.
  table = np.histogram2d(choices[:, 0], choices[:, 3], [range(5), range(4)])[0]
  expected = count * np.outer(policy[0], policy[3, :3])
  assert stats.chisquare(table.ravel(), expected.ravel()).pvalue > 1e-4


def test_a_sample_depends_on_its_key_alone():
  controller = policy_gradient_controller(VALID, _quality, _constant(0.0))
  state, keys = controller.init(), _keys(0, 6)
  together = np.asarray(controller.sample(state, keys))
  for s in range(6):
    alone = controller.sample(state, keys[s : s + 1])
    np.testing.assert_array_equal(alone[0], together[s])


@pytest.mark.parametrize('extreme', [50.0, 1e4, 1e30])
def test_extreme_logits_stay_finite(extreme):
  controller = policy_gradient_controller(VALID, _quality, _constant(1.0))
  logits = np.zeros(VALID.shape)
  logits[:, 0], logits[0, 1], logits[3, 2] = extreme, extreme, -extreme
  state = _with_logits(controller, logits)
  entropy = np.asarray(policy_entropy(state.logits, VALID))
  np.testing.assert_allclose(entropy, [np.log(2), 0, 0, 0], atol=1e-6)
  policy = np.asarray(controller.policy(state))
  np.testing.assert_allclose(policy.sum(axis=1), 1, rtol=1e-6)
  # The options that were chosen have probability 0.
  choices = np.array([[2, 1, 0, 1], [3, 1, 0, 2]], np.int32)
  new_state, metrics = controller.update(
    state, _outcome(choices, np.float32([1, 0])), 0
  )
  for leaf in jax.tree.leaves((new_state, metrics)):
    assert np.isfinite(leaf).all()


# Compilation


def test_jit_equals_eager_and_steps_do_not_retrace():
  weight = entropy_weight('cosine', 0.1, policy_delay=2, num_steps=8)
  controller = policy_gradient_controller(VALID, _quality, weight, policy_delay=2)
  traces = 0

  def step_function(state, keys, step):
    nonlocal traces
    traces += 1
    choices = controller.sample(state, keys)
    rewards = jnp.mean(choices, axis=1).astype(jnp.float32)
    return controller.update(state, _outcome(choices, rewards), step), choices

  jitted = jax.jit(step_function)
  eager_state = jitted_state = controller.init()
  for step in range(8):
    keys = _keys(step, 3)
    if step == 6:  # commitment is data too
      commitment = jnp.array([1, 1, 0, 2], jnp.int32)
      eager_state = controller.commit(eager_state, commitment)
      jitted_state = controller.commit(jitted_state, commitment)
    (jitted_state, jitted_metrics), jitted_choices = jitted(
      jitted_state, keys, jnp.int32(step)
    )
    (eager_state, eager_metrics), eager_choices = step_function(
      eager_state, keys, jnp.int32(step)
    )
    np.testing.assert_array_equal(jitted_choices, eager_choices)
    for a, b in zip(
      jax.tree.leaves((jitted_state, jitted_metrics)),
      jax.tree.leaves((eager_state, eager_metrics)),
      strict=True,
    ):
      np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
  assert traces == 1 + 8


# Convergence


@functools.cache
def _final_policies(baseline, num_samples, num_seeds=30, num_steps=1500):
  """Policies after searches on the mean quality of what is chosen, and the optima."""
  num_decisions, num_options = 8, 4
  valid = np.ones((num_decisions, num_options), bool)
  delay = num_steps // 4
  controller = policy_gradient_controller(
    valid,
    _quality,
    entropy_weight('cosine', 0.1, delay, num_steps),
    policy_delay=delay,
    baseline=baseline,
  )

  def search(key):
    quality_key, run_key = jax.random.split(key)
    qualities = jax.vmap(
      lambda k: jax.random.permutation(k, jnp.linspace(0, 1, num_options))
    )(jax.random.split(quality_key, num_decisions))

    def one_step(state, step):
      keys = jax.random.split(jax.random.fold_in(run_key, step), num_samples)
      choices = controller.sample(state, keys)
      chosen = jnp.take_along_axis(qualities[None], choices[..., None], axis=-1)
      rewards = jnp.mean(chosen, axis=(1, 2))
      return controller.update(state, _outcome(choices, rewards), step)[0], None

    state, _ = jax.lax.scan(one_step, controller.init(), jnp.arange(num_steps))
    return controller.policy(state), qualities

  policies, qualities = jax.jit(jax.vmap(search))(_keys(0, num_seeds))
  return np.asarray(policies), np.asarray(qualities)


@pytest.mark.parametrize(
  ('baseline', 'num_samples'), [('leave_one_out', 4), ('moving', 4)]
)
def test_every_seed_finds_the_optimum(baseline, num_samples):
  policies, qualities = _final_policies(baseline, num_samples)
  found = (policies.argmax(axis=-1) == qualities.argmax(axis=-1)).all(axis=1)
  assert found.sum() == len(found) == 30


def test_the_policy_has_converged_at_the_end():
  policies, _ = _final_policies('leave_one_out', 4)
  assert np.median(policies.max(axis=-1)) > 0.95
