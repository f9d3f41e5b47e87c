"""The critic against ridge regression in numpy, and against known additive models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fliqs_jax.search import critic

ERRORS = np.array([1.0, 0.25, 0.07, 0.0], np.float32)


def _measured(seed, rounds, num_samples, num_decisions, noise, truth=None):
  """Measurements of an additive model, and the model float[N, K]."""
  rng = np.random.default_rng(seed)
  if truth is None:
    sensitivities = rng.lognormal(0.0, 1.0, num_decisions)
    truth = -sensitivities[:, None] * ERRORS * rng.uniform(0.7, 1.3, (num_decisions, 4))
  choices = rng.integers(4, size=(rounds, num_samples, num_decisions))
  qualities = truth[np.arange(num_decisions), choices].sum(-1)
  qualities += 100 * rng.normal(size=(rounds, 1))  # of the examples, which cancels
  qualities += noise * rng.normal(size=qualities.shape)
  state = critic.no_measurements(rounds, num_samples, num_decisions)
  for row in range(rounds):
    state = critic.record(state, jnp.int32(choices[row]), jnp.float32(qualities[row]))
  return state, truth


def _errors(num_decisions):
  return jnp.tile(jnp.asarray(ERRORS), (num_decisions, 1))


def _ridge(state, errors, ratio):
  """The same posterior mean by its primal normal equations, in float64."""
  errors = np.asarray(errors, np.float64)
  choices = np.asarray(state.choices)
  rounds, samples, decisions = choices.shape
  options = errors.shape[1]
  x = np.eye(options)[choices]
  x = (x - x.mean(1, keepdims=True)).reshape(rounds * samples, -1)
  y = np.asarray(state.qualities, np.float64)
  y = (y - y.mean(1, keepdims=True)).reshape(-1)
  flat = errors.reshape(-1)
  same = np.kron(np.eye(decisions), np.ones((options, options)))
  prior = np.outer(flat, flat) * (1 + same) + np.diag((0.3 * flat) ** 2 + 1e-6)
  scale = np.trace(x @ prior @ x.T) / len(y)
  precision = x.T @ x / (ratio * scale) + np.linalg.inv(prior)
  return np.linalg.solve(precision, x.T @ y / (ratio * scale)).reshape(errors.shape)


@pytest.mark.parametrize('seed', range(5))
def test_utilities_are_the_ridge_regression_of_one_of_the_noise_ratios(seed):
  state, _ = _measured(seed, rounds=20, num_samples=4, num_decisions=5, noise=0.2)
  found = critic.utilities(state, _errors(5))
  distances = [
    np.abs(_ridge(state, _errors(5), ratio) - np.asarray(found)).max()
    for ratio in critic._NOISE_RATIOS
  ]
  assert min(distances) < 2e-3 * np.abs(found).max()


@pytest.mark.parametrize('seed', range(10))
def test_an_additive_model_is_found(seed):
  state, truth = _measured(seed, 100, 4, num_decisions=12, noise=0.05)
  found = np.asarray(critic.utilities(state, _errors(12)))
  differences = found - found[:, -1:], truth - truth[:, -1:]
  assert np.corrcoef(*map(np.ravel, differences))[0, 1] > 0.99


def test_more_noise_shrinks_towards_the_prior():
  clean, truth = _measured(0, rounds=40, num_samples=4, num_decisions=6, noise=0.0)
  noisy, _ = _measured(0, 40, 4, 6, noise=30.0, truth=truth)
  spread = lambda state: np.ptp(critic.utilities(state, _errors(6)), axis=1).sum()
  assert spread(noisy) < 5 * spread(clean)


def test_nothing_measured_is_worth_nothing():
  state = critic.no_measurements(8, 4, 3)
  np.testing.assert_array_equal(critic.utilities(state, _errors(3)), np.zeros((3, 4)))


def test_rows_that_are_not_filled_change_nothing():
  full, truth = _measured(3, rounds=10, num_samples=4, num_decisions=4, noise=0.1)
  roomy = critic.no_measurements(25, 4, 4)
  for choices, qualities in zip(full.choices, full.qualities):
    roomy = critic.record(roomy, choices, qualities)
  np.testing.assert_allclose(
    critic.utilities(roomy, _errors(4)), critic.utilities(full, _errors(4)), atol=2e-4
  )


def test_the_unit_of_the_quality_does_not_matter():
  state, _ = _measured(1, rounds=30, num_samples=4, num_decisions=5, noise=0.1)
  scaled = state._replace(qualities=1000 * state.qualities)
  np.testing.assert_allclose(
    np.asarray(critic.utilities(scaled, _errors(5))) / 1000,
    critic.utilities(state, _errors(5)),
    rtol=0.02,
    atol=2e-3,
  )


def test_jit_is_eager():
  state, _ = _measured(2, rounds=15, num_samples=4, num_decisions=4, noise=0.1)
  eager = critic.utilities(state, _errors(4))
  jitted = jax.jit(critic.utilities)(state, _errors(4))
  np.testing.assert_allclose(jitted, eager, rtol=1e-4, atol=1e-4)
