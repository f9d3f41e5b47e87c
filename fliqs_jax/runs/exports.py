"""Records of exports in the folder of a run: reports and times."""

from collections.abc import Mapping
import math
from typing import Any

from etils import epath

from fliqs_jax.errors import ConfigError
from fliqs_jax.runs import files

FOLDER = 'export'  # in the folder of the run, with a folder for each target
REPORT_FILE = 'report.json'  # of one export
SPEED_FILE = 'speed.json'  # in the folder of the run

_REPORT_FIELDS = ('file', 'examples', 'largest_difference', 'relative_error',
                  'agreement', 'eval', 'bytes', 'bytes_in_float32',
                  'bytes_in_bfloat16')  # fmt: skip
_SPEED_FIELDS = ('device', 'repeats', 'rows')
_ROW_FIELDS = (
  'model', 'target', 'batch_size', 'ms', 'of_float32', 'arithmetic'
)  # fmt: skip


def read_reports(workdir: epath.Path) -> dict[str, dict[str, Any]]:
  """Returns the report of each export in the folder of a run, by target.

  Raises:
    ConfigError: where one is damaged.
  """
  paths = sorted((workdir / FOLDER).glob(f'*/{REPORT_FILE}'))
  reports = {path.parent.name: files.read_json(path) for path in paths}
  for path, report in zip(paths, reports.values()):
    _check(report, _REPORT_FIELDS, path)
  return reports


def read_speed(workdir: epath.Path) -> dict[str, Any] | None:
  """Returns the times of the exported network; None where none were measured.

  Raises:
    ConfigError: where the file is damaged.
  """
  path = workdir / SPEED_FILE
  if not path.exists():
    return None
  speed = files.read_json(path)
  _check(speed, _SPEED_FIELDS, path)
  for row in speed['rows']:
    _check(row, _ROW_FIELDS, path)
  return speed


def arithmetic_text(row: Mapping[str, Any]) -> str:
  """Returns how the layers of a timed model multiply, as `3 integer, 1 float32`."""
  return ', '.join(f'{count} {kind}' for kind, count in row['arithmetic'].items())


def _check(content, fields, path):
  """Raises ConfigError where a field is missing or a number in it is not finite."""
  if not isinstance(content, Mapping):
    raise ConfigError(f'{str(path)!r} is damaged: expected objects')
  for name in fields:
    value = content.get(name)
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
      raise ConfigError(f'{str(path)!r} is damaged: it has no usable {name!r}')
