"""The policy-gradient controller (FLIQS, Section 4; TuNAS, arXiv 2008.06120).

In optax's form: `policy_gradient_controller(...)` returns pure functions `init`,
`sample` and `update`, and their state is a pytree that the train state carries.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

Schedule = Callable[[jax.Array], jax.Array]  # progress in [0, 1] -> [0, 1]

# How the entropy penalty rises, as a fraction of its final value.
ENTROPY_SCHEDULES: dict[str, Schedule] = {
  'cosine': lambda progress: 0.5 * (1 - jnp.cos(jnp.pi * progress)),
  'linear': lambda progress: progress,
  'constant': lambda progress: jnp.ones_like(progress),
  'step': lambda progress: jnp.where(progress < 0.5, 0.0, 1.0),
}

BASELINES = ('leave_one_out', 'moving')


class ControllerState(NamedTuple):
  """The policy and what its update carries along."""

  logits: jax.Array  # shape=(N, K), float32; entries of options that do not exist are 0
  opt_state: Any  # Adam's state for the logits
  baseline: jax.Array  # shape=(), float32, moving average of the rewards
  num_rewards: jax.Array  # shape=(), int32, steps that the baseline has averaged
  commitment: jax.Array  # shape=(N,), int32, the final choices, -1 while there are none


class Controller(NamedTuple):
  """A policy over N independent decisions of up to K options."""

  init: Callable[[], ControllerState]
  sample: Callable[[ControllerState, jax.Array], jax.Array]
  update: Callable[..., tuple[ControllerState, dict[str, jax.Array]]]


def entropy_weight(
  schedule: str, end_value: float, policy_delay: int, num_steps: int
) -> Schedule:
  """Returns `β_H(t)`, rising from the policy's first step to the last one.

  β_H(t) = β_H_end · schedule(clip((t − t_policy) / (T − t_policy), 0, 1))
  """

  def weight(step):
    progress = (step - policy_delay) / max(num_steps - policy_delay, 1)
    return end_value * ENTROPY_SCHEDULES[schedule](jnp.clip(progress, 0.0, 1.0))

  return weight


def policy_gradient_controller(
  valid: np.ndarray,
  entropy_weight: Schedule,
  learning_rate: float = 5e-2,
  policy_delay: int = 0,
  baseline: str = 'leave_one_out',
  baseline_momentum: float = 0.95,
) -> Controller:
  """Returns the REINFORCE controller with an entropy penalty.

      b    ← μ·b + (1 − μ)·mean_s r_s
      A_s  = r_s − b            or, leave-one-out,   r_s − mean_{s'≠s} r_s'
      L(θ) = −mean_s [A_s · mean_i log π_i(α_s,i)] + β_H(t) · mean_i H(π_i)

  Args:
    valid: bool[N, K], which options exist.
    entropy_weight: `β_H(t)`, from `entropy_weight`.
    learning_rate: of Adam on the logits.
    policy_delay: the first step whose rewards update the policy.
    baseline: one of `BASELINES`; `leave_one_out` takes two samples a step or more.
    baseline_momentum: μ of the moving baseline, which starts at the first rewards.
  """
  optimizer = optax.adam(learning_rate)

  def init() -> ControllerState:
    """Returns the uniform policy."""
    logits = jnp.zeros(valid.shape, jnp.float32)
    return ControllerState(
      logits=logits,
      opt_state=optimizer.init(logits),
      baseline=jnp.zeros((), jnp.float32),
      num_rewards=jnp.zeros((), jnp.int32),
      commitment=jnp.full(valid.shape[:1], -1, jnp.int32),
    )

  def sample(state: ControllerState, keys: jax.Array) -> jax.Array:
    """Returns choices int32[S, N] for keys [S], each of which is consumed."""
    logits = _log_policy(state.logits, valid)
    sampled = jax.vmap(lambda key: jax.random.categorical(key, logits))(keys)
    return jnp.where(state.commitment >= 0, state.commitment, sampled.astype(jnp.int32))

  def loss(logits, choices, advantages, weight):
    log_policy = _log_policy(logits, valid)
    chosen = jnp.take_along_axis(log_policy[None], choices[..., None], axis=-1)
    log_likelihood = jnp.mean(chosen, axis=(1, 2))  # [S]
    mean_entropy = jnp.mean(policy_entropy(logits, valid))
    return -jnp.mean(advantages * log_likelihood) + weight * mean_entropy

  def update(state, choices, rewards, step):
    """Returns the state after one step and the step's metrics.

    Args:
      state: the current state.
      choices: int32[S, N], what `sample` returned.
      rewards: float32[S].
      step: int32[], the training step; before `policy_delay` and once the policy is
        committed only the baseline moves.
    """
    chex.assert_shape(choices, (None, valid.shape[0]))
    chex.assert_shape(rewards, choices.shape[:1])
    momentum = jnp.where(state.num_rewards == 0, 0.0, baseline_momentum)
    moving = momentum * state.baseline + (1 - momentum) * jnp.mean(rewards)
    if baseline == 'moving':
      advantages = rewards - moving
    else:
      others = (jnp.sum(rewards) - rewards) / (rewards.size - 1)
      advantages = rewards - others
    weight = entropy_weight(step)
    gradient = jax.grad(loss)(state.logits, choices, advantages, weight)
    updates, opt_state = optimizer.update(gradient, state.opt_state)
    logits = optax.apply_updates(state.logits, updates)
    active = (step >= policy_delay) & jnp.all(state.commitment < 0)
    logits, opt_state = jax.tree.map(
      lambda new, old: jnp.where(active, new, old),
      (logits, opt_state),
      (state.logits, state.opt_state),
    )
    new_state = state._replace(
      logits=logits,
      opt_state=opt_state,
      baseline=moving,
      num_rewards=state.num_rewards + 1,
    )
    metrics = {
      'entropy': jnp.mean(policy_entropy(logits, valid)),
      'entropy_weight': weight,
      'baseline': moving,
    }
    return new_state, metrics

  return Controller(init, sample, update)


def policy_probabilities(logits: jax.Array, valid: np.ndarray) -> jax.Array:
  """Returns `π`, float32[N, K], 0 for options that do not exist."""
  return jnp.where(valid, jnp.exp(_log_policy(logits, valid)), 0.0)


def policy_entropy(logits: jax.Array, valid: np.ndarray) -> jax.Array:
  """Returns the entropy of each decision in nats, float32[N]."""
  log_policy = jnp.where(valid, _log_policy(logits, valid), 0.0)
  return -jnp.sum(policy_probabilities(logits, valid) * log_policy, axis=-1)


def _log_policy(logits, valid):
  return jax.nn.log_softmax(jnp.where(valid, logits, -jnp.inf), axis=-1)
