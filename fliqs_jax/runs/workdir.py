"""The folder of a run: its config, its layers, and the history of its training."""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import fcntl
import functools
import json
import os
import socket
import time
from typing import Any

from etils import epath
import jax
import ml_collections

from fliqs_jax.errors import ConfigError, RunError
from fliqs_jax.layers.layer import Layer, to_json
from fliqs_jax.numerics.formats import NAMES
from fliqs_jax.runs import distributed, files, sessions
from fliqs_jax.runs import result as result_lib
from fliqs_jax.runs.config import complete

CONFIG_FILE = 'config.json'
LAYERS_FILE = 'layers.json'
HISTORY_FILE = 'history.jsonl'
LOCK_FILE = '.lock'
# Fields that say where a run computes, and change nothing of what.
_PLACES = ('fsdp',)
# The folder in a workdir of what was in the files that its config names.
_INPUTS_FOLDER = 'inputs'


def check(
  config: ml_collections.ConfigDict, workdir: epath.Path, allow_config_change: bool
) -> None:
  """Checks that a run with this config can start or go on in a folder.

  Raises:
    ConfigError: where the folder is a file, or Orbax cannot read from it, or it holds
      a run with another config, unless that is allowed; the message names the
      differing fields.
  """
  if workdir.exists() and not workdir.is_dir():
    raise ConfigError(f'workdir {str(workdir)!r} is a file: expected a folder')
  if not _is_remote(workdir) and set('[\\') & set(str(workdir.absolute())):
    raise ConfigError(
      f'workdir {str(workdir.absolute())!r}: expected a path without [ and \\, from '
      'which Orbax reads no checkpoint'
    )
  if not (workdir / CONFIG_FILE).exists() or allow_config_change:
    return
  old = _flatten(_computed(result_lib.config_to_json(complete(read_config(workdir)))))
  new = _flatten(_computed(result_lib.config_to_json(config)))
  differing = [
    f'{key} ({old.get(key)!r} there, {new.get(key)!r} here)'
    for key in sorted({*old, *new})
    if old.get(key) != new.get(key)
  ]
  if differing:
    raise ConfigError(
      f'workdir {str(workdir)!r} holds a run with another config: '
      f'{", ".join(differing)}; name another folder, or go on all the same with '
      '--allow_config_change of fliqs_jax.main'
    )


def same_run(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
  """Returns whether configs in JSON compute the same, wherever they do so."""
  return _computed(old) == _computed(new)


def _computed(config):
  return {name: value for name, value in config.items() if name not in _PLACES}


def read_config(workdir: epath.Path) -> ml_collections.ConfigDict:
  """Returns the config of the run in a folder.

  Raises:
    ConfigError: where there is none, or it is damaged.
  """
  path = workdir / CONFIG_FILE
  try:
    content = json.loads(path.read_text())
  except FileNotFoundError:
    raise ConfigError(
      f'{str(workdir)!r} holds no run: it has no {CONFIG_FILE}'
    ) from None
  except (OSError, ValueError) as error:
    raise ConfigError(f'{str(path)!r} cannot be read: {error}') from None
  if not isinstance(content, dict):
    raise ConfigError(f'{str(path)!r} is damaged: expected a JSON object')
  content = result_lib.without_layers(content)
  for name, kind in (('mode', str), ('dataset', str), ('model', dict)):
    if not isinstance(content.get(name), kind):
      raise ConfigError(f'{str(path)!r} is damaged: it has no usable {name!r}')
  config = ml_collections.ConfigDict(content, convert_dict=True)
  try:
    complete(config)
  except (TypeError, ValueError, AttributeError, KeyError) as error:
    reason = next(iter(str(error).splitlines()), type(error).__name__)
    raise ConfigError(f'{str(path)!r} is damaged: {reason}') from None
  return config


def check_layers(layers: Sequence[Layer], workdir: epath.Path) -> None:
  """Checks that a folder's run, if there is one, is of a network with these layers.

  Raises:
    ConfigError: where it is of another one; the message names the first that differs.
  """
  path = workdir / LAYERS_FILE
  if not path.exists():  # no run, or one of a version that did not write it
    return
  try:
    there = {layer['path']: layer for layer in json.loads(path.read_text())}
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise ConfigError(f'{str(path)!r} cannot be read: {error}') from None
  here = {layer['path']: layer for layer in to_json(layers)}
  for name in {**here, **there}:
    if here.get(name) != there.get(name):
      raise ConfigError(
        f'workdir {str(workdir)!r} holds a run of another network: layer {name!r} '
        'differs or is in one of them alone; name another folder'
      )


def check_model(config: ml_collections.ConfigDict, workdir: epath.Path) -> None:
  """Checks that a folder's run is of a config's network.

  Raises:
    ConfigError: where it is of another one, or there is no run.
  """
  trained = read_config(workdir).model.to_dict()
  if trained != result_lib.config_to_json(config)['model']:
    raise ConfigError(
      f'{str(workdir)!r} holds a checkpoint of model {trained}, but the config has '
      f'{config.model.to_dict()}'
    )


def read_history(workdir: epath.Path) -> list[dict[str, Any]]:
  """Returns the lines of a run's history; none where it has not begun.

  Raises:
    ConfigError: where it is damaged. A last line that was cut off is left out.
  """
  path = workdir / HISTORY_FILE
  try:
    lines = path.read_text().splitlines() if path.exists() else []
  except (OSError, UnicodeDecodeError) as error:
    raise ConfigError(f'{str(path)!r} cannot be read: {error}') from None
  rows = []
  for number, line in enumerate(lines, 1):
    if _step_of(line) < float('inf'):
      rows.append(json.loads(line))
    elif number < len(lines):
      raise ConfigError(f'{str(path)!r} is damaged: line {number} is not of a history')
  return rows


@contextlib.contextmanager
def lock(workdir: epath.Path) -> Iterator[None]:
  """Makes the folder if it is not there, and keeps other runs out of it meanwhile.

  The first process holds the operating system's lock on a file, which a process that
  dies lets go. Remote folders (`gs://`) have no such lock, and are not kept.

  Raises:
    ConfigError: where another run holds the folder, or it cannot be written to.
  """
  with contextlib.ExitStack() as stack:
    problem = None
    if jax.process_index() == 0:
      try:
        workdir.mkdir(parents=True, exist_ok=True)
        problem = None if _is_remote(workdir) else _lock(workdir, stack)
      except OSError as error:
        problem = _cannot_write(workdir, error)
    distributed.raise_everywhere(problem)
    yield


def _lock(workdir, stack):
  """Takes the lock until the stack unwinds; returns who else holds it, if anyone."""
  path = workdir / LOCK_FILE
  file = stack.enter_context(path.open('a'))
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    holder = path.read_text().strip() or 'another process'
    return (
      f'workdir {str(workdir)!r} is in use by {holder}: wait until that run ends, or '
      'name another --workdir'
    )
  file.truncate(0)
  file.write(f'process {os.getpid()} on {socket.gethostname()}')
  file.flush()


def write(workdir: epath.Path, name: str, content: Any) -> None:
  """Writes a JSON file into the folder, which is made if it is not there.

  Raises:
    RunError: where it cannot be written.
  """
  with _failures_named(workdir):
    workdir.mkdir(parents=True, exist_ok=True)
    result_lib.write_json(workdir / name, content)


def keep_inputs(config: ml_collections.ConfigDict, workdir: epath.Path) -> None:
  """Copies the files that a config names into a workdir, which needs no other then.

  Raises:
    RunError: where they cannot be written.
  """
  with _failures_named(workdir):
    for original, kept in _inputs(config, workdir).values():
      if original.is_file():  # a table of no effect may be missing
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_bytes(original.read_bytes())


def kept_inputs(
  config: ml_collections.ConfigDict, workdir: epath.Path
) -> dict[str, str]:
  """Returns the copies in a workdir by field, of files that changed or are gone."""
  return {
    field: str(kept)
    for field, (original, kept) in _inputs(config, workdir).items()
    if kept.exists()
    and not (original.is_file() and original.read_bytes() == kept.read_bytes())
  }


def _inputs(config, workdir):
  """Returns the original and the copy of each file that a config names, by field."""
  named = {
    'formats': config.formats,
    'architecture': config.architecture,
    'search.latency_table': config.search.latency_table,
  }
  return {
    field: (files.to_path(name), workdir / _INPUTS_FOLDER / f'{field}.json')
    for field, name in named.items()
    if name and name not in NAMES and not files.is_written_out(name)
  }


@contextlib.contextmanager
def _failures_named(workdir, *kinds):
  try:
    yield
  except (OSError, *kinds) as error:
    raise RunError(_cannot_write(workdir, error)) from None


def _cannot_write(workdir, error):
  reason = getattr(error, 'strerror', None) or str(error).splitlines()[0]
  reason = reason.rpartition('}} ')[2]  # after the operation that TensorFlow names
  return f'cannot write to workdir {str(workdir)!r}: {reason}'


def _is_remote(path):
  return '://' in str(path)


# Scalars of a line that say how the search goes; the others say how training does.
_OF_SEARCH = ('reward', 'quality', 'cost', 'cost_ratio', 'entropy')
EVALUATED = 'eval_'  # before the name of a scalar that an evaluation meanwhile measured


class History:
  """`history.jsonl`, the session and TensorBoard events, by the first process.

  One line for each logging step: its `step`, scalars averaged over the steps since the
  line before, and `policy`, `{decision: {format: probability}}`. Events are written
  where clu and TensorFlow are installed, in groups by their names: `train/`, `search/`,
  `eval/` and `policy/`. A context manager.
  """

  def __init__(self, workdir: epath.Path, start: int):
    """Opens the history of a run that goes on after step `start`.

    Raises:
      RunError: where it cannot be written, as in `write`.
    """
    self._workdir, self._path = workdir, workdir / HISTORY_FILE
    self._written = None  # step and time of the line before
    self._writes, self._events = jax.process_index() == 0, None
    if not self._writes:
      return
    metric_writers, kinds = _import_metric_writers()
    self._failures_named = functools.partial(_failures_named, workdir, *kinds)
    with self._failures_named():
      exists = self._path.exists()
      lines = self._path.read_text().splitlines(keepends=True) if exists else []
      # Lines after the checkpoint that the run goes on from will be written again.
      self._replace([line for line in lines if _step_of(line) <= start])
      self._session = sessions.Recorder(workdir, start)
      if metric_writers:
        self._events = metric_writers.SummaryWriter(str(workdir))

  def __enter__(self) -> 'History':
    return self

  def __exit__(self, error_type, *_) -> None:
    if not self._events:
      return
    # What stopped the run is not hidden by what that did to the events.
    expected = (RunError,) if error_type else ()
    with contextlib.suppress(*expected), self._failures_named():
      self._events.close()

  def write(
    self, step: int, scalars: dict[str, float], policy: dict[str, dict[str, float]]
  ) -> None:
    """Appends a line; it is in the file when the call returns."""
    if not self._writes:
      return
    line = json.dumps({'step': step, **scalars, 'policy': policy}) + '\n'
    with self._failures_named():
      if _is_remote(self._path):  # object stores write whole objects
        self._replace([*self._lines, line])
      else:
        with self._path.open('a') as file:
          file.write(line)
      self._session.update(step)
    self._write_events(step, {
        **{_group(name): value for name, value in scalars.items()},
        **self._steps_per_second(step),
        **{f'policy/{decision}/{option}': probability
           for decision, options in policy.items()
           for option, probability in options.items()},
    })  # fmt: skip

  def write_evaluation(self, step: int, evaluated: Mapping[str, float]) -> None:
    """Writes events of the evaluation at the end, which the result holds."""
    if self._writes:
      with self._failures_named():
        self._session.update(step)
      self._write_events(step, {f'eval/{name}': evaluated[name] for name in evaluated})

  def _write_events(self, step, scalars):
    if self._events:
      with self._failures_named():
        self._events.write_scalars(step, scalars)
        self._events.flush()

  def _steps_per_second(self, step):
    """Returns the rate since the line before; before the first one is compiling."""
    before, self._written = self._written, (step, time.monotonic())
    if before is None:
      return {}
    steps, seconds = (now - then for now, then in zip(self._written, before))
    return {'train/steps_per_second': steps / seconds}

  def _replace(self, lines):
    temporary = self._workdir / f'.{HISTORY_FILE}.tmp'
    temporary.write_text(''.join(lines))
    temporary.replace(self._path)
    self._lines = lines if _is_remote(self._path) else []


def _group(name):
  """Returns the name of a scalar of a line as TensorBoard groups it."""
  if name.startswith(EVALUATED):
    return 'eval/' + name.removeprefix(EVALUATED)
  return ('search/' if name in _OF_SEARCH else 'train/') + name


def _import_metric_writers():
  """Returns clu's writers and their errors; None and none without TensorFlow."""
  # Imported here, since it takes seconds and whoever reads runs does without.
  try:
    from clu import metric_writers
    import tensorflow as tf
  except ImportError:
    return None, ()
  return metric_writers, (tf.errors.OpError,)


def _step_of(line):
  try:
    step = json.loads(line)['step']
  except (ValueError, KeyError, TypeError, RecursionError):
    return float('inf')  # cut off by an interruption
  return step if isinstance(step, int) else float('inf')


def _flatten(tree, prefix=''):
  if not isinstance(tree, dict):
    return {prefix: tree}
  return {
    path: leaf
    for key, value in tree.items()
    for path, leaf in _flatten(value, f'{prefix}.{key}' if prefix else key).items()
  }
