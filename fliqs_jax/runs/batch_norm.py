"""Statistics of batch norm, estimated anew under given formats."""

from collections.abc import Callable, Iterable
import itertools
import logging

import jax
import numpy as np

from fliqs_jax.runs import distributed
from fliqs_jax.runs.setup import Setup
from fliqs_jax.training import moving_averages, sharding, steps
from fliqs_jax.training.task import Batch
from fliqs_jax.training.train_state import TrainState

_logger = logging.getLogger(__name__)

# (state, choices int32[N], batches [S, B, ...]) -> the state with their statistics
Reestimate = Callable[[TrainState, np.ndarray, Iterable[Batch]], TrainState]


def make_reestimate(setup: Setup, mesh: jax.sharding.Mesh) -> Reestimate:
  """Returns the function that estimates statistics; it compiles once for all choices.

  A network without batch norm stays as it is, as one does for which no batch is left.
  """
  step = steps.make_statistics_step(setup.task, setup.space, mesh)
  placed, everywhere = sharding.batch_sharding(mesh), sharding.replicated(mesh)

  def reestimate(state, choices, batches):
    if not jax.tree.leaves(state.batch_stats):
      return state
    choices = jax.device_put(choices, everywhere)

    def update(batch, statistics):
      batch = sharding.place(batch, placed, setup.data.whole)
      statistics = jax.device_put(statistics, everywhere)
      return jax.device_get(step(state, choices, batch, statistics))

    batches = iter(batches)
    first = list(itertools.islice(batches, 1))
    if not first:
      _logger.warning('No batches are left: batch norm keeps its moving averages.')
      return state
    old = distributed.to_host(state.batch_stats)
    new, kept = moving_averages.reestimate(update, old, itertools.chain(first, batches))
    if kept:
      _logger.info('No finite moving averages, left as they are: %s.', ', '.join(kept))
    return state.replace(batch_stats=jax.device_put(new, everywhere))

  return reestimate
