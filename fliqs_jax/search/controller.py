"""Controllers: the policy that is searched, and how it learns (FLIQS, Section 4).

In optax's form: a controller is a NamedTuple of pure functions, and its state is a
pytree that the train state carries. `policy_gradient_controller` is REINFORCE as the
paper and TuNAS (arXiv 2008.06120) have it.

Examples:
  Two decisions, of which the last option earns most:

  >>> import jax
  >>> import numpy as np
  >>> from fliqs_jax.search.controller import Outcome, policy_gradient_controller
  >>> controller = policy_gradient_controller(
  ...   valid=np.ones((2, 3), bool),
  ...   reward=lambda qualities, costs: qualities - costs,
  ...   entropy_weight=lambda step: 0.0,
  ... )
  >>> state, update = controller.init(), jax.jit(controller.update)
  >>> for step, key in enumerate(jax.random.split(jax.random.key(0), 100)):
  ...   choices = controller.sample(state, jax.random.split(key, 4))
  ...   outcome = Outcome(choices, choices.mean(1), np.zeros(4))
  ...   state, metrics = update(state, outcome, step)
  >>> controller.policy(state).argmax(1)
  Array([2, 2], dtype=int32)
"""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple, Protocol

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


ControllerState = Any  # a pytree of arrays, whose structure is the controller's own


class Outcome(NamedTuple):
  """Choices of the S samples of one step, with their qualities and costs."""

  choices: jax.Array  # shape=(S, N), int32
  qualities: jax.Array  # shape=(S,), float32
  costs: jax.Array  # shape=(S,), float32, in the cost model's unit
  # shape=(), bool; where False the qualities are to be ignored.
  measured: jax.Array | bool = True


class Init(Protocol):
  """Returns the state before the first step."""

  def __call__(self) -> ControllerState: ...


class Sample(Protocol):
  """Returns choices int32[S, N] for keys [S], each of which is consumed."""

  def __call__(self, state: ControllerState, keys: jax.Array) -> jax.Array: ...


class Update(Protocol):
  """Returns the state after training step `step`, int32[], and the step's metrics.

  Among the metrics, which are scalars, is the mean `reward` of the samples.
  """

  def __call__(
    self, state: ControllerState, outcome: Outcome, step: jax.Array
  ) -> tuple[ControllerState, dict[str, jax.Array]]: ...


class Policy(Protocol):
  """Returns `π`, float32[N, K], 0 for options that do not exist."""

  def __call__(self, state: ControllerState) -> jax.Array: ...


class Commit(Protocol):
  """Returns the state in which every sample is `choices`, int32[N], from now on."""

  def __call__(self, state: ControllerState, choices: jax.Array) -> ControllerState: ...


class FinalChoices(Protocol):
  """Returns the committed choices int32[N], else the likeliest ones."""

  def __call__(self, state: ControllerState) -> jax.Array: ...


class Scores(Protocol):
  """Returns float32[N, K], the worth of each option; their sum sets the commitment."""

  def __call__(self, state: ControllerState) -> jax.Array: ...


class IsMeasured(Protocol):
  """Returns whether the samples of a step are measured on shared examples, bool[]."""

  def __call__(self, step: jax.Array) -> jax.Array: ...


class Controller(NamedTuple):
  """A policy over N independent decisions of up to K options.

  Where `is_measured` is None, the quality of a sample is that of its own part of the
  batch, on which the weights train under it. Otherwise it comes from a forward pass of
  its own, at the steps for which `is_measured` holds.
  """

  init: Init
  sample: Sample
  update: Update
  policy: Policy
  commit: Commit
  final_choices: FinalChoices
  scores: Scores
  is_measured: IsMeasured | None = None


class PolicyGradientState(NamedTuple):
  """The policy and what its update carries along."""

  logits: jax.Array  # shape=(N, K), float32; entries of options that do not exist are 0
  opt_state: optax.OptState  # Adam's state for the logits
  baseline: jax.Array  # shape=(), float32, moving average of the rewards
  num_rewards: jax.Array  # shape=(), int32, steps that the baseline has averaged
  commitment: jax.Array  # shape=(N,), int32, the final choices, -1 while there are none
  # shape=(), float32, in the cost model's unit; data, so that a program is the same for
  # all targets.
  target: jax.Array


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
  reward: Callable[[jax.Array, jax.Array], jax.Array],
  entropy_weight: Schedule,
  learning_rate: float = 5e-2,
  policy_delay: int = 0,
  baseline: str = 'leave_one_out',
  baseline_momentum: float = 0.95,
  target: float = 1.0,
) -> Controller:
  """Returns the REINFORCE controller with an entropy penalty.

      b    ← μ·b + (1 − μ)·mean_s r_s
      A_s  = r_s − b            or, leave-one-out,   r_s − mean_{s'≠s} r_s'
      L(θ) = −mean_s [A_s · mean_i log π_i(α_s,i)] + β_H(t) · mean_i H(π_i)

  Before `policy_delay` and once the policy is committed only the baseline moves.

  Args:
    valid: bool[N, K], which options exist.
    reward: (qualities, costs) -> rewards `r`, float32[S], of costs in multiples of the
      target; see `rewards`.
    entropy_weight: `β_H(t)`, from `entropy_weight`.
    learning_rate: of Adam on the logits.
    policy_delay: the first step whose rewards update the policy.
    baseline: one of `BASELINES`; `leave_one_out` takes two samples a step or more.
    baseline_momentum: μ of the moving baseline, which starts at the first rewards.
    target: in the unit of the costs.
  """
  optimizer = optax.adam(learning_rate)

  def update(state, outcome, step):
    choices = outcome.choices
    rewards = reward(outcome.qualities, outcome.costs / state.target)
    chex.assert_shape(choices, (None, valid.shape[0]))
    chex.assert_shape(rewards, choices.shape[:1])
    moving, advantages = _advantages(state, rewards, baseline, baseline_momentum)
    weight = entropy_weight(step)
    gradient = jax.grad(_loss)(state.logits, valid, choices, advantages, weight)
    active = (step >= policy_delay) & jnp.all(state.commitment < 0)
    state = _descend(optimizer, state, gradient, active)
    metrics = {
      'reward': jnp.mean(rewards),
      'entropy': jnp.mean(policy_entropy(state.logits, valid)),
      'entropy_weight': weight,
      'baseline': moving,
    }
    return state._replace(baseline=moving, num_rewards=state.num_rewards + 1), metrics

  return Controller(
    init=functools.partial(_init, valid, optimizer, target),
    sample=functools.partial(_sample, valid=valid),
    update=update,
    policy=lambda state: masked_softmax(state.logits, valid),
    commit=lambda state, choices: state._replace(commitment=choices),
    final_choices=functools.partial(_final_choices, valid=valid),
    scores=lambda state: _log_policy(state.logits, valid),
  )


def _init(valid, optimizer, target):
  logits = jnp.zeros(valid.shape, jnp.float32)  # the uniform policy
  return PolicyGradientState(
    logits=logits,
    opt_state=optimizer.init(logits),
    baseline=jnp.zeros((), jnp.float32),
    num_rewards=jnp.zeros((), jnp.int32),
    commitment=jnp.full(valid.shape[:1], -1, jnp.int32),
    target=jnp.float32(target),
  )


def _sample(state, keys, valid):
  logits = _log_policy(state.logits, valid)
  sampled = jax.vmap(lambda key: jax.random.categorical(key, logits))(keys)
  return jnp.where(state.commitment >= 0, state.commitment, sampled.astype(jnp.int32))


def _descend(optimizer, state, gradient, active):
  """Returns the state after a step of the optimizer, or as it is where not active."""
  updates, opt_state = optimizer.update(gradient, state.opt_state)
  logits = optax.apply_updates(state.logits, updates)
  new_state = state._replace(logits=logits, opt_state=opt_state)
  return jax.tree.map(lambda new, old: jnp.where(active, new, old), new_state, state)


def _final_choices(state, valid):
  likeliest = jnp.argmax(masked_softmax(state.logits, valid), axis=1).astype(jnp.int32)
  return jnp.where(state.commitment >= 0, state.commitment, likeliest)


def _advantages(state, rewards, baseline, momentum):
  """Returns the moving baseline after this step, and the advantages float32[S]."""
  momentum = jnp.where(state.num_rewards == 0, 0.0, momentum)
  moving = momentum * state.baseline + (1 - momentum) * jnp.mean(rewards)
  if baseline == 'moving':
    return moving, rewards - moving
  others = (jnp.sum(rewards) - rewards) / (rewards.size - 1)
  return moving, rewards - others


def _loss(logits, valid, choices, advantages, entropy_weight):
  log_policy = _log_policy(logits, valid)
  chosen = jnp.take_along_axis(log_policy[None], choices[..., None], axis=-1)
  log_likelihood = jnp.mean(chosen, axis=(1, 2))  # [S]
  mean_entropy = jnp.mean(policy_entropy(logits, valid))
  return -jnp.mean(advantages * log_likelihood) + entropy_weight * mean_entropy


def policy_entropy(logits: jax.Array, valid: np.ndarray) -> jax.Array:
  """Returns the entropy of each decision in nats, float32[N]."""
  log_policy = jnp.where(valid, _log_policy(logits, valid), 0.0)
  return -jnp.sum(masked_softmax(logits, valid) * log_policy, axis=-1)


def masked_softmax(logits: jax.Array, valid: np.ndarray) -> jax.Array:
  """Returns the softmax of each row over its valid options, 0 for the others."""
  return jnp.where(valid, jnp.exp(_log_policy(logits, valid)), 0.0)


def _log_policy(logits, valid):
  return jax.nn.log_softmax(jnp.where(valid, logits, -jnp.inf), axis=-1)
