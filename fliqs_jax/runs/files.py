"""Files that a config names: formats, results, latency tables."""

from collections.abc import Collection
import contextlib
import os
import shutil
import tempfile
from typing import Any
import weakref

from etils import epath

from fliqs_jax.errors import ConfigError
from fliqs_jax.search import assignments, latency, options
from fliqs_jax.search.assignments import Assignment

# Far above the result of any network, far below what would fill the memory.
_MAX_BYTES = 2**24


def to_path(given: os.PathLike | str, name: str = 'path') -> epath.Path:
  """Returns the path of a file or folder that a user names; `~` is the home folder.

  Args:
    given: the path.
    name: of the argument, for messages.

  Raises:
    ConfigError: where it is no path, or empty, which would be the current folder.
  """
  text = os.fspath(given) if isinstance(given, str | os.PathLike) else ''
  if not isinstance(text, str) or not text or '\0' in text:
    raise ConfigError(f'{name}={given!r}: expected the path of a file or folder')
  return epath.Path(given).expanduser()


class TemporaryFolder:
  """A folder that is deleted when nothing holds this object any more, or at exit.

  Unlike `tempfile.TemporaryDirectory` it warns of nothing then.

  Attributes:
    path: of the folder.
  """

  def __init__(self):
    """Makes the folder, which is its owner's alone."""
    self.path = epath.Path(tempfile.mkdtemp(prefix='fliqs_jax_'))
    weakref.finalize(self, shutil.rmtree, str(self.path), ignore_errors=True)


def copy_folder(
  source: epath.Path, target: epath.Path, leave_out: Collection[str] = ()
) -> str | None:
  """Copies a folder's files into a new or empty one; returns why it cannot, if so.

  Where it cannot, nothing is left of the copy.

  Args:
    source: the folder.
    target: to be made, in the source too.
    leave_out: names of files in the source that stay.
  """
  if not source.is_dir():
    return f'{str(source)!r} is gone, of which a copy was to be made'
  is_new, given = not target.exists(), repr(str(target))
  if not is_new and (not target.is_dir() or any(target.iterdir())):
    return f'{given} exists: expected a new or empty folder'
  kept = [path for path in source.iterdir() if path.name not in leave_out]
  try:
    target.mkdir(parents=True, exist_ok=True)
    for path in kept:
      _copy(path, target / path.name)
  except BaseException as error:
    with contextlib.suppress(OSError):
      for path in [target] if is_new else list(target.iterdir()):
        path.rmtree() if path.is_dir() else path.unlink()
    if not isinstance(error, OSError):
      raise
    return f'cannot write to {given}: {error.strerror or error}'


def _copy(source, target):
  if not source.is_dir():
    source.copy(target)
    return
  content = list(source.iterdir())
  target.mkdir()
  for path in content:
    _copy(path, target / path.name)


def read_formats(spec: str) -> str | Assignment:
  """Returns what `config.formats` names: a format for all layers, or one for each.

  Those of each layer are the content of a file, or written out as such a content.

  Raises:
    ConfigError: where it is none of them; one line for each problem.
  """
  if options.is_option(spec):
    return spec
  if is_written_out(spec):
    return assignments.parse(assignments.load(spec.encode(), 'formats'), 'formats')
  if not to_path(spec).exists() and os.sep not in spec and '.' not in spec:
    options.find(spec)  # names the nearest format
  content = read_json(spec)
  return assignments.parse(content.get('formats', content), spec)


def is_written_out(spec: str) -> bool:
  """Returns whether `config.formats` is an assignment itself and names no file."""
  return spec.startswith('{')


def read_json(path: os.PathLike | str) -> dict[str, Any]:
  """Returns the JSON object in a file of formats or of a result.

  Raises:
    ConfigError: where there is none, or a key is given twice; one line.
  """
  given = str(path)
  try:
    with to_path(path).open('rb') as file:
      content = file.read(_MAX_BYTES + 1)
  except OSError as error:
    reason = error.strerror or type(error).__name__
    raise ConfigError(f'cannot read {given!r}: {reason}') from None
  if len(content) > _MAX_BYTES:
    raise ConfigError(
      f'{given!r} is larger than {_MAX_BYTES >> 20} MiB: {assignments.EXPECTED}'
    )
  return assignments.load(content, given)


def read_latency_table(path: os.PathLike | str) -> latency.LatencyTable:
  """Returns the content of a file of latencies.

  Raises:
    ConfigError: where it is missing, damaged, or no such file; one line.
  """
  given = str(path)
  try:
    text = to_path(path).read_text()
  except OSError as error:
    raise ConfigError(
      f'cannot read the latency table {given!r}: {error.strerror or error}'
    ) from None
  except UnicodeDecodeError as error:
    raise ConfigError(
      f'{given!r} is no latency table ({type(error).__name__}: {error}): expected a '
      'file from python -m fliqs_jax.measure'
    ) from None
  return latency.parse_table(text, given)
