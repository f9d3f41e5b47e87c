"""The train state: everything that a step reads and writes."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from flax import linen as nn
from flax import nnx, struct
from flax.training import train_state
import jax
import jax.numpy as jnp
import optax

from fliqs_jax.layers.variables import QUANT_STATS
from fliqs_jax.search.controller import Controller, ControllerState

BATCH_STATS = 'batch_stats'

Variables = Mapping[str, Any]  # `params` and, where there are some, `batch_stats`


class Arguments(NamedTuple):
  """Arguments that a network is called with."""

  args: tuple[Any, ...]
  kwargs: Mapping[str, Any]  # static: whether to train, by the name that it has there


def plain(variables: Any) -> Any:
  """Returns variables as nested dicts of arrays, without Flax's frozen dicts and boxes.

  `nn.with_partitioning` puts arrays in boxes, which `apply` does not need. A state of
  NNX, as of `nnx.state(model, nnx.Param)`, has numbers for names in lists.
  """
  return nn.unbox(_nested_dicts(variables))


def _nested_dicts(tree):
  if isinstance(tree, Mapping):
    return {str(name): _nested_dicts(value) for name, value in tree.items()}
  return tree.get_value() if isinstance(tree, nnx.Variable) else tree


class TrainState(train_state.TrainState):
  """Flax's train state (step, params, opt_state, and static apply_fn, tx), and more."""

  batch_stats: Any  # running statistics of batch norm, empty where there is none
  quant_stats: Any  # moving averages of the activations' statistics
  controller: ControllerState | None  # None where formats are fixed
  skipped: jax.Array  # shape=(), int32, unsound steps in a row, up to the last one
  key: jax.Array  # shape=(), typed PRNG key; never consumed, only folded into
  # Moving averages of the parameters, float32, under which qualities are measured; None
  # where none are.
  averaged_params: Any = None
  # What else the network updates: {collection: variables}.
  collections: Mapping[str, Any] = struct.field(default_factory=dict)

  @property
  def model_stats(self) -> dict[str, Any]:
    """The variable collections that a forward pass in training updates."""
    return {
      BATCH_STATS: self.batch_stats,
      QUANT_STATS: self.quant_stats,
      **self.collections,
    }


def create_train_state(
  model: nn.Module,
  example: Arguments,
  optimizer: optax.GradientTransformation,
  controller: Controller | None,
  key: jax.Array,
  variables: Variables | None = None,
) -> TrainState:
  """Returns the state before the first step.

  Args:
    model: the network: a linen module, or another object with its `init` and `apply`.
    example: what the network is called with, in any batch size: arrays or their shapes.
    optimizer: of the weights.
    controller: None for fixed formats.
    key: consumed.
    variables: of a network that has its own already, which are copied; None for those
      of `model.init`.
  """
  init_key, run_key = jax.random.split(key)
  if variables is None:
    args = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), example.args)
    variables = model.init(init_key, *args, **example.kwargs)
  else:
    variables = jax.tree.map(jnp.copy, variables)
  variables, averaged = plain(variables), None
  if controller is not None and controller.is_measured is not None:
    zeros = lambda p: jnp.zeros(p.shape, jnp.float32)
    averaged = jax.tree.map(zeros, variables['params'])
  state = TrainState.create(
    apply_fn=model.apply,
    params=variables.pop('params'),
    tx=optimizer,
    batch_stats=variables.pop(BATCH_STATS, {}),
    quant_stats=variables.pop(QUANT_STATS, {}),
    controller=controller and controller.init(),
    skipped=jnp.zeros((), jnp.int32),
    key=run_key,
    averaged_params=averaged,
    collections=variables,
  )
  # Flax's 0 is a Python number, whose type is weak. That of a checkpoint is not, and a
  # run that goes on would compile its step again.
  return state.replace(step=jnp.zeros((), jnp.int32))
