"""The train state: everything that a step reads and writes."""

from collections.abc import Callable
from typing import Any

from flax import linen as nn
from flax.training import train_state
import jax
import jax.numpy as jnp
import optax

from fliqs_jax.controller import Controller, ControllerState
from fliqs_jax.layers import QUANT_STATS

BATCH_STATS = 'batch_stats'


class TrainState(train_state.TrainState):
  """Flax's train state (step, params, opt_state, and static apply_fn, tx), and more."""

  batch_stats: Any  # running statistics of batch norm, empty where there is none
  quant_stats: Any  # moving averages of the activations' statistics
  controller: ControllerState | None  # None where formats are fixed
  skipped: jax.Array  # shape=(), int32, unsound steps in a row, up to the last one
  key: jax.Array  # shape=(), typed PRNG key; never consumed, only folded into

  @property
  def model_stats(self) -> dict[str, Any]:
    """The variable collections that a forward pass in training updates."""
    return {BATCH_STATS: self.batch_stats, QUANT_STATS: self.quant_stats}


def create_train_state(
  model: nn.Module,
  inputs: jax.Array,
  optimizer: optax.GradientTransformation,
  controller: Controller | None,
  key: jax.Array,
  preprocess: Callable[[jax.Array], jax.Array] = lambda inputs: inputs,
) -> TrainState:
  """Returns the state before the first step.

  Args:
    model: the network, called as `model(inputs, train)`.
    inputs: an example input, in any batch size.
    optimizer: of the weights.
    controller: None for fixed formats.
    key: consumed.
    preprocess: of the inputs in a batch, to what the network takes.
  """
  init_key, run_key = jax.random.split(key)
  variables = model.init(init_key, inputs, train=False)
  return TrainState.create(
    apply_fn=lambda variables, inputs, **options: model.apply(
      variables, preprocess(inputs), **options
    ),
    params=variables['params'],
    tx=optimizer,
    batch_stats=variables.get(BATCH_STATS, {}),
    quant_stats=variables.get(QUANT_STATS, {}),
    controller=controller and controller.init(),
    skipped=jnp.zeros((), jnp.int32),
    key=run_key,
  )
