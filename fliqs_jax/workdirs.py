"""The folder of a run: its config, and the history that it writes while it trains."""

import json
from typing import Any

from clu import metric_writers
from etils import epath
import jax
import ml_collections

from fliqs_jax import results
from fliqs_jax.config import ConfigError

CONFIG_FILE = 'config.json'
HISTORY_FILE = 'history.jsonl'


def check(
  config: ml_collections.ConfigDict, workdir: epath.Path, allow_config_change: bool
) -> None:
  """Checks that a run with this config can start or go on in a folder.

  Raises:
    ValueError: where the folder is a file, or holds a run with another config, unless
      that is allowed; the message names the differing fields.
  """
  if workdir.exists() and not workdir.is_dir():
    raise ValueError(f'workdir {str(workdir)!r} is a file: expected a folder')
  if not (workdir / CONFIG_FILE).exists() or allow_config_change:
    return
  old = _flatten(read_config(workdir).to_dict())
  new = _flatten(results.config_to_json(config))
  differing = [
    f'{key} ({old.get(key)!r} there, {new.get(key)!r} here)'
    for key in sorted({*old, *new})
    if old.get(key) != new.get(key)
  ]
  if differing:
    raise ValueError(
      f'workdir {str(workdir)!r} holds a run with another config: '
      f'{", ".join(differing)}; name another folder, or go on all the same with '
      '--allow_config_change of fliqs_jax.main'
    )


def read_config(workdir: epath.Path) -> ml_collections.ConfigDict:
  """Returns the config of the run in a folder.

  Raises:
    ValueError: where there is none, or it is damaged.
  """
  path = workdir / CONFIG_FILE
  try:
    content = json.loads(path.read_text())
  except FileNotFoundError:
    raise ValueError(
      f'{str(workdir)!r} holds no run: it has no {CONFIG_FILE}'
    ) from None
  except (OSError, ValueError) as error:
    raise ValueError(f'{str(path)!r} cannot be read: {error}') from None
  if not isinstance(content, dict):
    raise ValueError(f'{str(path)!r} is damaged: expected a JSON object')
  return ml_collections.ConfigDict(content, convert_dict=True)


def write(workdir: epath.Path, name: str, content: Any) -> None:
  """Writes a JSON file into the folder, which is made if it is not there.

  Raises:
    ConfigError: where it cannot be written.
  """
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    results.write_json(workdir / name, content)
  except OSError as error:
    raise ConfigError(
      f'cannot write to workdir {str(workdir)!r}: {error.strerror or error}'
    ) from None


class History:
  """`history.jsonl` and TensorBoard events, written by the first process.

  One line for each logging step: its `step`, scalars averaged over the steps since the
  line before, and `policy`, `{decision: {format: probability}}`. A context manager.
  """

  def __init__(self, workdir: epath.Path, start: int):
    """Opens the history of a run that goes on after step `start`."""
    self._writes = jax.process_index() == 0
    if not self._writes:
      return
    path = workdir / HISTORY_FILE
    # Lines after the checkpoint that the run goes on from will be written again.
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    kept = [line for line in lines if _step_of(line) <= start]
    temporary = workdir / f'.{HISTORY_FILE}.tmp'
    temporary.write_text(''.join(kept))
    temporary.replace(path)
    self._file = path.open('a')
    self._events = metric_writers.SummaryWriter(str(workdir))

  def __enter__(self) -> 'History':
    return self

  def __exit__(self, *_) -> None:
    if self._writes:
      self._file.close()
      self._events.close()

  def write(
    self, step: int, scalars: dict[str, float], policy: dict[str, dict[str, float]]
  ) -> None:
    """Appends a line; it is on disk when the call returns."""
    if not self._writes:
      return
    line: dict[str, Any] = {'step': step, **scalars, 'policy': policy}
    self._file.write(json.dumps(line) + '\n')
    self._file.flush()
    self._events.write_scalars(step, scalars)
    self._events.flush()


def _step_of(line):
  try:
    return json.loads(line)['step']
  except (ValueError, KeyError, TypeError):
    return float('inf')  # cut off by an interruption


def _flatten(tree, prefix=''):
  if not isinstance(tree, dict):
    return {prefix: tree}
  return {
    path: leaf
    for key, value in tree.items()
    for path, leaf in _flatten(value, f'{prefix}.{key}' if prefix else key).items()
  }
