"""Variables that a run starts from: of another run, of Orbax, or of Hugging Face."""

from collections.abc import Mapping
import functools

from flax import linen as nn
import jax
import numpy as np
import orbax.checkpoint as ocp

from fliqs_jax.errors import ConfigError
from fliqs_jax.runs import checkpoints, files, hugging_face
from fliqs_jax.training.train_state import (
  BATCH_STATS,
  Arguments,
  TrainState,
  Variables,
  plain,
)

_USED = ('params', BATCH_STATS)
_VARIABLES_ITEM = 'variables'  # of our own checkpoints


def read(path: str) -> Variables | None:
  """Returns the variables in a checkpoint as numpy arrays; None for an empty path.

  Args:
    path: a workdir, whose newest checkpoint is read, an Orbax checkpoint, or a folder
      of Hugging Face's with a `config.json` and safetensors of a Llama or Gemma.

  Raises:
    ConfigError: where there is none, it has no `params`, or is of another network.
  """
  if not path:
    return None
  if hugging_face.is_checkpoint(files.to_path(path)):
    return {'params': hugging_face.read(files.to_path(path))}
  folder = _find(files.to_path(path))
  try:
    with ocp.PyTreeCheckpointer() as checkpointer:
      item = checkpointer.metadata(folder).item_metadata
      tree = getattr(item, 'tree', item)
      as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
      content = checkpointer.restore(folder, restore_args=as_numpy)
  except Exception as error:  # Orbax raises many kinds
    reason = str(error).strip().splitlines()[0] if str(error).strip() else ''
    raise ConfigError(
      f'init_from={path!r} is not a checkpoint that can be read: {reason[:200]}'
    ) from None
  if not isinstance(content, Mapping) or 'params' not in content:
    raise ConfigError(
      f'init_from={path!r}: expected a checkpoint with `params`, found '
      f'{", ".join(map(str, content)) if isinstance(content, Mapping) else content}'
    )
  return {name: content[name] for name in _USED if name in content}


def _find(path):
  """Returns the folder of the tree of variables."""
  if not path.exists():
    raise ConfigError(f'init_from={str(path)!r} does not exist')
  path = path.absolute()
  if (path / checkpoints.FOLDER).is_dir():
    numbers = [int(p.name) for p in (path / checkpoints.FOLDER).iterdir()
               if p.name.isdigit()]  # fmt: skip
    if not numbers:
      raise ConfigError(f'init_from={str(path)!r} is a run without a checkpoint')
    path = path / checkpoints.FOLDER / str(max(numbers))
  for name in (_VARIABLES_ITEM, 'default'):  # items of a `CheckpointManager`
    if (path / name).is_dir():
      return path / name
  return path


def check(model: nn.Module, example: Arguments, given: Variables) -> None:
  """Checks that variables are those of a network.

  Raises:
    ConfigError: where there are no `params`, or with a line for each leaf that is
      missing, unknown, or of another shape.
  """
  if not isinstance(given, Mapping) or 'params' not in given:
    found = ', '.join(map(str, given)) if isinstance(given, Mapping) else type(given)
    raise ConfigError(
      f"variables to start from: expected {{'params': ...}}, found {found or 'none'}"
    )
  init = functools.partial(model.init, **example.kwargs)
  expected = jax.eval_shape(init, jax.random.key(0), *example.args)
  problems = []
  for name in _USED:
    if name == BATCH_STATS and name not in given:
      continue  # measured again at the end
    has, wants = _shapes(given.get(name, {})), _shapes(expected.get(name, {}))
    for path in sorted({*has, *wants}):
      if path not in has:
        found = 'is missing'
      elif path not in wants:
        found = f'{has[path]} is unknown to the network'
      elif has[path] != wants[path]:
        found = f'has shape {has[path]}'
      else:
        continue
      wanted = f': expected shape {wants[path]}' if path in wants else ''
      problems.append(f'variables to start from: {name}/{path} {found}{wanted}')
  if problems:
    raise ConfigError(*problems)


def _shapes(tree):
  return {
    jax.tree_util.keystr(path, simple=True, separator='/'): np.shape(leaf)
    for path, leaf in jax.tree.leaves_with_path(plain(tree))
  }


def start_from(state: TrainState, given: Variables) -> TrainState:
  """Returns the state with the given variables, in the dtypes and places of its own."""

  def replaced(own, new):
    return jax.device_put(np.asarray(new, own.dtype), own.sharding)

  return state.replace(
    **{
      name: jax.tree.map(replaced, getattr(state, name), plain(given[name]))
      for name in _USED
      if name in given
    }
  )
