"""An additive model of the quality: how much each option of each decision is worth.

    Q(α) ≈ μ_round + Σ_i u_i[α_i]

The critic is Bayesian linear regression of measured qualities on one-hot choices. The
S samples of a *round* are measured on the same examples, and are centred within it, so
that μ_round, which holds the examples and the weights of the day, drops out.

The prior says what is known before the first measurement: to second order the loss of
rounding grows with the mean squared error of the format (HAWQ, Dong et al., 2019, arXiv
1905.03696), so that `u_i[k] ≈ −s_i · e_k`, with `e_k` the error of format k on normal
data, and a sensitivity `s_i` of the decision that is unknown:

    Cov(u_i[k], u_j[l]) = e_k e_l (1 + 1[i = j]) + (0.3 e_k)² 1[i = j, k = l]

The first term is what all decisions have in common. The ratio of the noise to the prior
is the one with the largest evidence (MacKay, 1992, "Bayesian interpolation"), so that
nothing is tuned to the unit of the quality.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

# The share of an option's effect that the error of its format does not explain.
_OWN_EFFECT = 0.3
_SMALLEST_VARIANCE = 1e-6
_NOISE_RATIOS = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001)


class Measurements(NamedTuple):
  """Measured qualities: R rounds of S samples."""

  choices: jax.Array  # shape=(R, S, N), int32
  qualities: jax.Array  # shape=(R, S), float32
  count: jax.Array  # shape=(), int32, the rounds that are filled


def no_measurements(rounds: int, num_samples: int, num_decisions: int) -> Measurements:
  """Returns room for R rounds of S samples of N decisions."""
  return Measurements(
    choices=jnp.zeros((rounds, num_samples, num_decisions), jnp.int32),
    qualities=jnp.zeros((rounds, num_samples), jnp.float32),
    count=jnp.zeros((), jnp.int32),
  )


def record(
  measurements: Measurements, choices: jax.Array, qualities: jax.Array
) -> Measurements:
  """Returns the measurements with one round more; beyond R the last is replaced.

  Args:
    measurements: what was measured so far.
    choices: int32[S, N].
    qualities: float32[S], on the same examples.
  """
  chex.assert_shape(choices, measurements.choices.shape[1:])
  chex.assert_shape(qualities, measurements.qualities.shape[1:])
  last = measurements.qualities.shape[0] - 1
  row = jnp.minimum(measurements.count, last)
  return Measurements(
    choices=measurements.choices.at[row].set(choices),
    qualities=measurements.qualities.at[row].set(qualities),
    count=measurements.count + 1,
  )


@jax.jit
def utilities(measurements: Measurements, errors: jax.Array) -> jax.Array:
  """Returns the posterior mean of `u`, float32[N, K], zeros before any measurement.

  Solved in its dual form, of R·S unknowns, so that neither time nor memory grows with
  the square of N·K.

  Args:
    measurements: of up to R rounds.
    errors: float32[N, K], the relative error `e` of each option, 0 where padded.
  """
  num_options = errors.shape[1]
  rounds, num_samples, num_decisions = measurements.choices.shape
  size = rounds * num_samples
  filled = jnp.repeat(jnp.arange(rounds) < measurements.count, num_samples)
  chosen = jax.nn.one_hot(measurements.choices, num_options)
  chosen = chosen - jnp.mean(chosen, axis=1, keepdims=True)
  chosen = chosen.reshape(size, num_decisions, num_options) * filled[:, None, None]
  qualities = measurements.qualities
  qualities = (qualities - jnp.mean(qualities, axis=1, keepdims=True)).reshape(size)
  qualities = jnp.where(filled, qualities, 0.0)

  sensitivity = jnp.sum(chosen * errors, axis=-1)  # [R·S, N]
  common = jnp.sum(sensitivity, axis=-1)  # [R·S]
  variance = jnp.square(_OWN_EFFECT * errors) + _SMALLEST_VARIANCE
  own = (chosen * jnp.sqrt(variance)).reshape(size, -1)
  kernel = sensitivity @ sensitivity.T + jnp.outer(common, common) + own @ own.T
  weights = _dual_weights(kernel, qualities, filled)
  return (
    errors * (weights @ sensitivity)[:, None]
    + errors * (weights @ common)
    + variance * jnp.einsum('n,nik->ik', weights, chosen)
  )


def _dual_weights(kernel, qualities, filled):
  """Returns `(K + ρ·I)⁻¹ q` for the noise ratio ρ with the largest evidence."""
  count = jnp.maximum(jnp.sum(filled), 1)
  scale = jnp.trace(kernel) / count
  scale = jnp.where(scale > 0, scale, 1.0)
  identity = jnp.eye(kernel.shape[0])

  def solve(ratio):
    # Rows that are not filled add log 1 to the determinant.
    factor = jnp.linalg.cholesky(kernel / (scale * ratio) + identity)
    weights = jax.scipy.linalg.cho_solve((factor, True), qualities) / (scale * ratio)
    explained = jnp.maximum(qualities @ weights, jnp.finfo(jnp.float32).tiny)
    log_determinant = 2 * jnp.sum(jnp.log(jnp.diag(factor))) + count * jnp.log(ratio)
    return -0.5 * (count * jnp.log(explained / count) + log_determinant), weights

  evidence, weights = jax.lax.map(solve, jnp.array(_NOISE_RATIOS))
  return weights[jnp.argmax(evidence)]
