"""Calibration batches: kept for all that is measured of weights that do not train."""

from collections.abc import Sequence
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fliqs_jax.errors import ConfigError
from fliqs_jax.runs import evaluation, reconstruction, smoothing
from fliqs_jax.runs.batch_norm import make_reestimate
from fliqs_jax.runs.setup import Setup
from fliqs_jax.training import post_training, sharding
from fliqs_jax.training.train_state import TrainState

_STEPS_AHEAD = 3


class Calibration:
  """Measurements on the same batches under any choices, compiled once for all of them.

  Attributes:
    batches: `[S, B, ...]` each, this process's part, or whole ones.
    num_examples: in all of them.
  """

  def __init__(self, setup: Setup, mesh: jax.sharding.Mesh):
    """Takes `search.statistics_batches` of the setup's training batches.

    Args:
      setup: of the run, with the space that choices are of.
      mesh: from `sharding.make_mesh`.

    Raises:
      ConfigError: where there are no batches.
    """
    self._placed = sharding.batch_sharding(mesh)
    self._everywhere = sharding.replicated(mesh)
    self._whole = setup.data.whole
    batches = setup.data.train(setup.config.seed + 1, self._placed)
    count = setup.config.search.statistics_batches
    self.batches = list(itertools.islice(batches, count))
    if not self.batches:
      raise ConfigError('the training batches ended before the first one')
    self.num_examples = setup.config.batch_size * len(self.batches)
    held_out = setup.config.reward.split == 'validation'
    self._statistics_step = post_training.make_calibration_step(
      setup.task, setup.space, mesh
    )
    self._moments_step = post_training.make_moments_step(setup.task, setup.space, mesh)
    self._channels_step = post_training.make_channels_step(
      setup.task, setup.space, mesh
    )
    self._space, self._rounded = setup.space, {}
    self._quality_step = post_training.make_quality_step(
      setup.task, setup.space, mesh, held_out
    )
    self._reestimate = make_reestimate(setup, mesh)
    self._evaluate = evaluation.make_evaluate(setup, mesh)

  def with_activation_statistics(
    self, state: TrainState, choices: np.ndarray
  ) -> TrainState:
    """Returns the state with the statistics of activations, means over the batches.

    Args:
      state: with the weights.
      choices: int32[N], the formats under which they are measured.
    """
    choices, total = jax.device_put(choices, self._everywhere), None
    for batch, key in self._placed_batches(state):
      found = self._statistics_step(state, choices, batch, key)
      total = found if total is None else jax.tree.map(jnp.add, total, found)
      # Many programs that wait for each other's devices would block them all.
      jax.block_until_ready(total)
    mean = jax.tree.map(lambda a: a / len(self.batches), total)
    return state.replace(quant_stats=mean)

  def smooth(
    self, state: TrainState, choices: np.ndarray, strength: float
  ) -> TrainState:
    """Returns the state with parameters whose inputs of layers are smoother.

    Args:
      state: with the weights.
      choices: int32[N], the formats under which nothing is to change: unquantized.
      strength: of `smoothing.smooth`.

    Raises:
      ConfigError: where nothing can be smoothed.
    """
    choices = jax.device_put(choices, self._everywhere)
    batches = list(self._placed_batches(state))

    def look(batch, key, params):
      changed = state.replace(params=params)
      return jax.device_get(self._channels_step(changed, choices, batch, key))

    total = {}
    for batch, key in batches:
      for path, found in look(batch, key, state.params)[1].items():
        total[path] = np.maximum(total.get(path, 0.0), found)
    params, _ = smoothing.smooth(
      self._space, state.params, functools.partial(look, *batches[0]), total, strength
    )
    placed = jax.tree.map(
      lambda new, old: jax.device_put(new, old.sharding), params, state.params
    )
    return state.replace(params=placed)

  def reconstruct_weights(self, state: TrainState, choices: np.ndarray) -> None:
    """Rounds the weights by reconstruction in all that is measured from here on.

    Args:
      state: with the weights.
      choices: int32[N], the formats under which the inputs of layers are seen.
    """
    choices, total = jax.device_put(choices, self._everywhere), None
    for batch, key in self._placed_batches(state):
      found = self._moments_step(state, choices, batch, key)
      total = found if total is None else jax.tree.map(jnp.add, total, found)
      jax.block_until_ready(total)
    mean = jax.tree.map(lambda a: np.asarray(a) / len(self.batches), total)
    self._rounded = reconstruction.round_kernels(self._space, state, mean)

  def under(self, state: TrainState, choices: np.ndarray) -> TrainState:
    """Returns the state with weights as they are rounded under choices int32[N]."""
    return reconstruction.with_rounded(state, self._space, self._rounded, choices)

  def qualities(
    self, state: TrainState, candidates: Sequence[np.ndarray]
  ) -> np.ndarray:
    """Returns the mean quality of each of M choices int32[N], float64[M].

    Args:
      state: with the weights and the statistics of activations.
      candidates: which are measured on the same examples.
    """
    placed = [
      (self.under(state, choices), jax.device_put(choices, self._everywhere))
      for choices in candidates
    ]
    total = np.zeros(len(candidates))
    for batch, key in self._placed_batches(state):
      found = []
      for rounded, choices in placed:
        found.append(self._quality_step(rounded, choices, batch, key))
        # Many programs that wait for each other's devices would block them all.
        jax.block_until_ready(found[-_STEPS_AHEAD:][0])
      total += np.array(jax.device_get(found), np.float64)
    return total / len(self.batches)

  def evaluate(
    self, state: TrainState, choices: np.ndarray
  ) -> tuple[dict[str, float], TrainState]:
    """Returns the evaluation under choices int32[N], and the state that was evaluated.

    It has the weights and batch norm's statistics under these choices.
    """
    state = self._reestimate(self.under(state, choices), choices, self.batches)
    return self._evaluate(state, choices), state

  def _placed_batches(self, state: TrainState):
    """Yields the batches on the devices, each with a key of its own."""
    for index, batch in enumerate(self.batches):
      placed = sharding.place(batch, self._placed, self._whole)
      yield placed, self._key(state, index)

  def _key(self, state: TrainState, index: int) -> Any:
    return jax.random.fold_in(state.key, index)
