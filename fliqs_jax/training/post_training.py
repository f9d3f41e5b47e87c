"""The steps of a search without training: forward passes on training batches.

A network with batch norm is called as in training, so that each batch sets its own
statistics, as those of the end are estimated anew under the formats found. Any other
network is called as in evaluation.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from fliqs_jax.layers import channels, moments
from fliqs_jax.layers.replacement import observed_layers
from fliqs_jax.layers.variables import FORMATS, QUANT_STATS, nest
from fliqs_jax.search.space import SearchSpace
from fliqs_jax.training.sharding import batch_sharding, replicated
from fliqs_jax.training.task import Batch, Task
from fliqs_jax.training.train_state import TrainState

_INTERMEDIATES = 'intermediates'


def make_calibration_step(
  task: Task, space: SearchSpace, mesh: Mesh
) -> Callable[[TrainState, jax.Array, Batch, jax.Array], dict]:
  """Returns the jitted step that measures the statistics of activations on one batch.

  Args:
    task: what the network is fed.
    space: the search space.
    mesh: from `sharding.make_mesh`.

  Returns:
    `(state, choices int32[N], batch [S, B, ...], key) -> quant_stats` of the batch
    alone, which an average may be taken of. The key is consumed.
  """

  def calibration_step(state, choices, batch, key):
    # An average that holds nothing yet becomes that of the batch.
    nothing = jax.tree.map(jnp.zeros_like, state.quant_stats)
    state = state.replace(quant_stats=nothing)
    _, updated = _call(state, task, space, choices, _flat(batch), key, QUANT_STATS)
    return updated.get(QUANT_STATS, {})  # none where transformations keep none

  return _jit(calibration_step, mesh)


def make_moments_step(
  task: Task, space: SearchSpace, mesh: Mesh
) -> Callable[[TrainState, jax.Array, Batch, jax.Array], dict[str, jax.Array]]:
  """Returns the jitted step that measures the second moments of layers' inputs.

  Left out are layers that `observed_layers` does not show, and products that
  `moments.is_covered` does not cover.

  Args:
    task: what the network is fed.
    space: the search space.
    mesh: from `sharding.make_mesh`.

  Returns:
    `(state, choices int32[N], batch [S, B, ...], key) -> {path: float32[n, n]}`, means
    over the rows of inputs; of a layer that is called several times, their sum. The key
    is consumed.
  """

  def moments_step(state, choices, batch, key):
    found = {}

    def observe(path, x, w, product):
      if moments.is_covered(product):
        own = moments.second_moments(product, x, w)
        found[path] = found[path] + own if path in found else own

    with observed_layers(observe):
      _call(state, task, space, choices, _flat(batch), key, False)
    return found

  return _jit(moments_step, mesh)


def make_channels_step(
  task: Task, space: SearchSpace, mesh: Mesh
) -> Callable[[TrainState, jax.Array, Batch, jax.Array], tuple]:
  """Returns the jitted step that measures the channels that layers are given.

  The arguments are those of `make_moments_step`, and the same layers are left out.

  Returns:
    `(state, choices int32[N], batch [S, B, ...], key) -> (outputs, {path:
    float32[n]})`: what the network returns, and the largest magnitude of each input of
    a layer. The key is consumed.
  """

  def channels_step(state, choices, batch, key):
    found = {}

    def observe(path, x, w, product):
      del w
      if moments.is_covered(product):
        own = channels.input_magnitudes(product, x)
        found[path] = jnp.maximum(found[path], own) if path in found else own

    with observed_layers(observe):
      outputs, _ = _call(state, task, space, choices, _flat(batch), key, False)
    return outputs, found

  return _jit(channels_step, mesh)


def make_quality_step(
  task: Task, space: SearchSpace, mesh: Mesh, held_out: bool = False
) -> Callable[[TrainState, jax.Array, Batch, jax.Array], jax.Array]:
  """Returns the jitted step that measures the quality on one batch under choices.

  Args:
    task: what the network is fed, and what its outputs are worth.
    space: the search space.
    mesh: from `sharding.make_mesh`.
    held_out: whether it is measured on `batch['reward']`.

  Returns:
    `(state, choices int32[N], batch [S, B, ...], key) -> float32[]`. The key is
    consumed.
  """

  def quality_step(state, choices, batch, key):
    batch = _flat(batch['reward'] if held_out else batch)
    outputs, _ = _call(state, task, space, choices, batch, key, False)
    return jnp.mean(task.quality(outputs, batch))

  return _jit(quality_step, mesh)


def _call(state, task, space, choices, batch, key, mutable):
  """Returns the outputs of the network, and its updated variables by collection."""
  has_batch_norm = bool(jax.tree.leaves(state.batch_stats))
  arguments = task.arguments(batch, has_batch_norm)
  formats = nest(space.layers, space.bind(choices))
  rngs = None
  if has_batch_norm:
    mutable = [*state.model_stats, _INTERMEDIATES]
    rngs = {'dropout': key, 'params': jax.random.fold_in(key, 2)}
  found = state.apply_fn(
    {'params': state.params, FORMATS: formats, **state.model_stats},
    *arguments.args,
    mutable=mutable,
    rngs=rngs,
    **arguments.kwargs,
  )
  return found if mutable else (found, {})


def _flat(batch):
  """Returns a batch [S, B, ...] as [S · B, ...]."""
  return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), batch)


def _jit(step, mesh):
  everywhere = replicated(mesh)
  return jax.jit(
    step,
    in_shardings=(everywhere, everywhere, batch_sharding(mesh), everywhere),
    out_shardings=everywhere,
  )
