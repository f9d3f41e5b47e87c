"""Checkpoints of a run by Orbax: the train state and the position in the data."""

from typing import Any

from etils import epath
import grain
import jax
import orbax.checkpoint as ocp

from fliqs_jax.train_state import TrainState

FOLDER = 'checkpoints'
_NUM_KEPT = 3

# What evaluation needs is an item of its own, so that it can be read without the
# optimizer's and the controller's state, whose shapes depend on the run.
_VARIABLES = ('params', 'batch_stats', 'quant_stats', 'collections')
_TRAINING = ('step', 'opt_state', 'controller', 'key')


class Checkpoints:
  """The checkpoints in a workdir, written in the background.

  A context manager: on leaving, what is being written is finished.
  """

  def __init__(self, workdir: epath.Path):
    self._manager = ocp.CheckpointManager(
      workdir.absolute() / FOLDER,
      options=ocp.CheckpointManagerOptions(max_to_keep=_NUM_KEPT),
    )

  def __enter__(self) -> 'Checkpoints':
    return self

  def __exit__(self, *_) -> None:
    self._manager.close()

  def latest_step(self) -> int | None:
    """Returns the step of the newest checkpoint, None where there is none."""
    return self._manager.latest_step()

  def save(self, state: TrainState, batches: grain.DatasetIterator) -> None:
    """Saves the state, which is copied before the call returns."""
    self._manager.save(
      int(state.step),
      args=ocp.args.Composite(
        variables=ocp.args.StandardSave(_pick(state, _VARIABLES)),
        training=ocp.args.StandardSave(_pick(state, _TRAINING)),
        batches=grain.checkpoint.CheckpointSave(batches),
      ),
    )

  def restore(self, state: TrainState, batches: grain.DatasetIterator) -> TrainState:
    """Returns the newest checkpoint's state and sets the iterator to its position.

    Args:
      state: arrays or their shapes, dtypes and shardings.
      batches: the run's iterator over training batches.
    """
    restored = self._manager.restore(
      self.latest_step(),
      args=ocp.args.Composite(
        variables=ocp.args.StandardRestore(_abstract(state, _VARIABLES)),
        training=ocp.args.StandardRestore(_abstract(state, _TRAINING)),
        batches=grain.checkpoint.CheckpointRestore(batches),
      ),
    )
    return state.replace(**restored.variables, **restored.training)

  def restore_variables(self, state: TrainState) -> TrainState:
    """Returns the state with the newest checkpoint's parameters and statistics."""
    restored = self._manager.restore(
      self.latest_step(),
      args=ocp.args.Composite(
        variables=ocp.args.StandardRestore(_abstract(state, _VARIABLES))
      ),
    )
    return state.replace(**restored.variables)


def _pick(state, fields) -> dict[str, Any]:
  return {field: getattr(state, field) for field in fields}


def _abstract(state, fields):
  return jax.tree.map(ocp.utils.to_shape_dtype_struct, _pick(state, fields))
