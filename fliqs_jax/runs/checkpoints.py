"""Checkpoints of a run by Orbax: the train state and the position in the data."""

from collections.abc import Callable
import contextlib
import json
import logging
import re
from typing import Any
import zlib

from etils import epath
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from fliqs_jax.data.batches import BatchIterator
from fliqs_jax.errors import RunError
from fliqs_jax.training.train_state import TrainState

FOLDER = 'checkpoints'
_NUM_KEPT = 3

# What evaluation needs is an item of its own, so that it can be read without the
# optimizer's and the controller's state, whose shapes depend on the run.
_ITEMS = {
  'variables': ('params', 'batch_stats', 'quant_stats', 'collections'),
  'training': (
    'step', 'opt_state', 'averaged_params', 'controller', 'skipped', 'key',
  ),
}  # fmt: skip

# How TensorStore ends what it says of a refusal of the operating system.
_REFUSAL = re.compile(r"[^:]+(?= \[os_error_code='\d+'\])")

# What says more of TensorStore than of the file: the drivers that came upon the fault,
# and all from its specification on.
_INTERNALS = re.compile(
  r'Error opening "\w+" driver: |See full TensorStore .*| \[tensorstore_spec.*'
  r'| \[source locations.*|<bound method .*',
  re.DOTALL,
)

_logger = logging.getLogger(__name__)


class Checkpoints:
  """The checkpoints in a workdir, written in the background.

  A damaged one is noticed, and the one before it taken. A context manager: on leaving,
  what is being written is finished.
  """

  def __init__(self, workdir: epath.Path, read_only: bool = False):
    self._folder = workdir.absolute() / FOLDER
    self._read_only = read_only
    with self._failures_named(), _without_warnings():
      self._manager = ocp.CheckpointManager(
        self._folder,
        options=ocp.CheckpointManagerOptions(
          max_to_keep=None if read_only else _NUM_KEPT,
          read_only=read_only,
          create=not read_only,
        ),
      )

  def __enter__(self) -> 'Checkpoints':
    return self

  def __exit__(self, error_type, *_) -> None:
    # What stopped the run is not hidden by what that did to the checkpoint.
    expected = (RunError,) if error_type else ()
    with contextlib.suppress(*expected), self._failures_named():
      self._manager.close()

  def latest_step(self) -> int | None:
    """Returns the step of the newest checkpoint, None where there is none."""
    return self._manager.latest_step()

  def save(self, state: TrainState, batches: BatchIterator) -> None:
    """Saves the state, which is copied before the call returns.

    A checkpoint of the same step is replaced.

    Raises:
      RunError: where this checkpoint or the one before cannot be written.
    """
    items = {name: _pick(state, fields) for name, fields in _ITEMS.items()}
    with self._failures_named():
      if self._manager.latest_step() == int(state.step):
        self._manager.delete(int(state.step))
      self._manager.save(
        int(state.step),
        args=ocp.args.Composite(
          **{name: ocp.args.StandardSave(item) for name, item in items.items()},
          fingerprints=ocp.args.JsonSave(
            {name: int(_fingerprint(item)) for name, item in items.items()}
          ),
          batches=ocp.args.JsonSave(_sealed(batches.get_state())),
        ),
      )

  def restore(self, state: TrainState, batches: BatchIterator) -> TrainState:
    """Returns the newest sound checkpoint's state, and sets the iterator as it was.

    Damaged ones that are newer are deleted, so that they can be saved again.

    Args:
      state: arrays or their shapes, dtypes and shardings.
      batches: the run's iterator over training batches.

    Raises:
      RunError: where there are checkpoints and all are damaged.
    """

    def read(step):
      restored = self._read(step, state, ('variables', 'training'))
      position = self._manager.restore(
        step, args=ocp.args.Composite(batches=ocp.args.JsonRestore())
      )
      batches.set_state(_unsealed(position.batches))
      return restored

    newest, restored = self._newest_sound(read)
    for step in self._manager.all_steps():
      if step > newest:
        self._manager.delete(step)
    return restored

  def restore_variables(self, state: TrainState) -> TrainState:
    """Returns the state with the newest sound checkpoint's parameters and statistics.

    Raises:
      RunError: where there are checkpoints and all are damaged.
    """
    return self._newest_sound(lambda step: self._read(step, state, ('variables',)))[1]

  def _newest_sound(self, read: Callable[[int], Any]) -> tuple[int, Any]:
    problems = []
    for step in sorted(self._manager.all_steps(), reverse=True):
      try:
        return step, read(step)
      except Exception as error:  # damage comes up as whatever stumbles over it
        problems.append(f'step {step}: {_reason(error)}')
        _logger.warning(
          'Checkpoint %d in %s is damaged (%s).', step, self._folder, _reason(error)
        )
    raise RunError(
      f'no checkpoint in {str(self._folder)!r} can be read ({"; ".join(problems)}): '
      'name another --workdir, or delete this one to start again'
    )

  def _read(self, step, state, names):
    """Returns the state with the named items of a checkpoint, if they are sound."""
    restored = self._manager.restore(
      step,
      args=ocp.args.Composite(
        **{
          name: ocp.args.StandardRestore(_abstract(state, _ITEMS[name]))
          for name in names
        },
        fingerprints=ocp.args.JsonRestore(),
      ),
    )
    for name in names:
      if int(_fingerprint(restored[name])) != restored.fingerprints[name]:
        raise ValueError(f'its {name} are not what was saved')
      state = state.replace(**restored[name])
    return state

  @contextlib.contextmanager
  def _failures_named(self):
    try:
      yield
    except (OSError, ValueError, RuntimeError) as error:
      where = f'in {str(self._folder)!r}: {_reason(error)}'
      if self._read_only:
        raise RunError(f'cannot read the checkpoints {where}') from error
      raise RunError(
        f'cannot write a checkpoint {where}; the ones before are as they were: make '
        'room, and start the run again'
      ) from error


@contextlib.contextmanager
def _without_warnings():
  """Orbax warns of what follows from `read_only`, on the user's terminal."""
  logger = logging.getLogger('absl')
  is_error = lambda record: record.levelno >= logging.ERROR
  logger.addFilter(is_error)
  try:
    yield
  finally:
    logger.removeFilter(is_error)


def _reason(error):
  refusal = _REFUSAL.search(str(error))
  if refusal or getattr(error, 'strerror', None):
    return refusal[0].strip() if refusal else error.strerror
  lines = _INTERNALS.sub('', str(error)).strip().splitlines()
  return lines[0].strip()[:200] if lines else type(error).__name__


@jax.jit
def _fingerprint(tree) -> jax.Array:
  """Returns uint32[], another one for every change of a byte, and whatever the mesh.

  A sum modulo 2³² of bytes times odd numbers: what one byte changes cannot vanish, and
  more of them only by a chance of 2⁻³².
  """
  total = jnp.uint32(0)
  for leaf in jax.tree.leaves(tree):
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      leaf = jax.random.key_data(leaf)
    if leaf.dtype == jnp.bool_:
      leaf = leaf.astype(jnp.uint8)
    content = jax.lax.bitcast_convert_type(leaf, jnp.uint8).astype(jnp.uint32)
    total = 31 * total + jnp.sum(content * _odd_numbers(content.shape))
  return total


def _odd_numbers(shape):
  """Returns 1, 3, 5, … in the order of memory, uint32 of a shape, modulo 2³².

  Not reshaped from a vector, for which an array that is split over devices would be
  gathered.
  """
  index, stride = jnp.zeros(shape, jnp.uint32), 1
  for axis in reversed(range(len(shape))):
    numbers = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    index += jnp.uint32(stride % 2**32) * numbers
    stride *= shape[axis]
  return 2 * index + 1


def _sealed(state: dict[str, Any]) -> dict[str, Any]:
  return {'state': state, 'checksum': _checksum(state)}


def _unsealed(content) -> dict[str, Any]:
  if content['checksum'] != _checksum(content['state']):
    raise ValueError('its position in the data is not what was saved')
  return content['state']


def _checksum(state) -> int:
  return zlib.crc32(json.dumps(state, sort_keys=True).encode())


def _pick(state, fields) -> dict[str, Any]:
  return {field: getattr(state, field) for field in fields}


def _abstract(state, fields):
  return jax.tree.map(ocp.utils.to_shape_dtype_struct, _pick(state, fields))
