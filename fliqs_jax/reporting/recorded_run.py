"""A run as its workdir records it, finished or not."""

from collections.abc import Mapping
import math
from typing import Any, NamedTuple

from etils import epath

from fliqs_jax.errors import ConfigError
from fliqs_jax.reporting import units
from fliqs_jax.runs import exports, files
from fliqs_jax.runs.quality import Quality, from_evaluation
from fliqs_jax.runs.result import RESULT_FILE, read_result
from fliqs_jax.runs.sessions import Session, read_sessions
from fliqs_jax.runs.validation import OWN_BATCHES
from fliqs_jax.runs.workdir import (
  CONFIG_FILE,
  HISTORY_FILE,
  read_config,
  read_history,
)

_NUMBER = (int, float)

# What a report needs of a result: fields by type, of the entries of a mapping too.
_RESULT_FIELDS = {
  'model': str,
  'dataset': str,
  'cost_model': str,
  'cost_unit': str,
  'cost': _NUMBER,
  'formats': dict,
  'eval': {'loss': _NUMBER, 'num_examples': int},
  'uniform_costs': dict,
  'policy': dict,
  'versions': dict,
  'config': dict,
}
_LAYER_FIELDS = {
  'kind': str,
  'macs': int,
  'params': int,
  'cost': _NUMBER,
  'uniform_costs': dict,
}
_POINT_FIELDS = {'cost': _NUMBER, 'lost': _NUMBER, 'within': bool, 'chosen': bool}
_DECISIONS_FIELD = dict.fromkeys(('weights', 'activations'), (str, type(None)))
_CONFIG_FIELDS = {
  'mode': str,
  'num_steps': int,
  'dataset': str,
  'model': {'name': str},
  'search': {
    'activation_delay': int,
    'policy_delay': int,
    'commit_step': int,
    'hard_budget': bool,
  },
}


class Run(NamedTuple):
  """The content of a run's folder."""

  workdir: epath.Path
  label: str  # the folder's name
  config: dict[str, Any]
  history: list[dict[str, Any]]
  result: dict[str, Any] | None  # None where the run is not finished
  sessions: list[Session]  # none where a version without them made the run
  exports: dict[str, dict[str, Any]]  # the report of each, by target
  speed: dict[str, Any] | None  # None where `measure --end_to_end` was not run

  @property
  def kind(self) -> str:
    """The origin of the formats: searched, uniform, or otherwise fixed."""
    if self.config['mode'] == 'search':
      return 'searched'
    return 'uniform' if self.uniform_format else 'fixed'

  @property
  def network(self) -> str:
    """The name of the network, with its width where it has one."""
    model = self.config['model']
    width = None if self.made_in_python else model.get('width')
    return model['name'] + (f', width {width:g}' if width else '')

  @property
  def made_in_python(self) -> bool:
    """True for a run of `fliqs_jax.search`, whose network no config can name."""
    return self.config['dataset'] == OWN_BATCHES

  @property
  def unit(self) -> units.Unit:
    """The unit in which the cost and the target of a finished run read well."""
    costs = self.result['cost'], self.result.get('target') or 0
    return units.choose(costs, self.result['cost_unit'])

  @property
  def quality(self) -> Quality:
    """The quality that the evaluation of a finished run measured."""
    return from_evaluation(self.result['eval'])

  @property
  def uniform_format(self) -> str | None:
    """The format that all layers of a finished run have, if they have one."""
    assigned = self.result['formats'].values() if self.result else ()
    names = {name for operands in assigned for name in operands.values()}
    return names.pop() if len(names) == 1 else None


def read_run(workdir: str) -> Run:
  """Returns the run in a folder, finished or not.

  Raises:
    ConfigError: where the folder holds none, or a file in it is damaged; one line.
  """
  folder = files.to_path(workdir)
  config = read_config(folder).to_dict()
  _check_fields(config, _CONFIG_FIELDS, folder / CONFIG_FILE)
  history = read_history(folder)
  for row in history:
    _check_row(row, folder / HISTORY_FILE)
  path, result = folder / RESULT_FILE, None
  if path.exists():
    result = read_result(path)
    _check_fields(result, _RESULT_FIELDS, path)
    _check_tables(result, path)
  return Run(
    workdir=folder,
    label=folder.absolute().name,
    config=config,
    history=history,
    result=result,
    sessions=read_sessions(folder),
    exports=exports.read_reports(folder),
    speed=exports.read_speed(folder),
  )


def decisions_by_layer(
  result: Mapping[str, Any],
) -> dict[str, dict[str, str | None]]:
  """Returns `{path: {operand: decision}}`; None where the operand's format is fixed.

  Results of versions that did not write it have it by the names of their decisions: a
  decision is called after a layer, or after a folder of layers that share it, and
  `:weights` or `:activations` where these are decided separately.
  """
  written = {
    path: layer['decisions']
    for path, layer in result.get('layers', {}).items()
    if 'decisions' in layer
  }
  return written or {
    path: {operand: _decision_named_after(path, operand, result) for operand in formats}
    for path, formats in result['formats'].items()
  }


def _decision_named_after(path, operand, result):
  """Returns the decision of the smallest group that its name says, None without one."""
  parts = path.split('/')
  groups = ['/'.join(parts[:end]) for end in range(len(parts), 0, -1)]
  names = (name for group in groups for name in (f'{group}:{operand}', group))
  format_name = result['formats'][path][operand]
  return next((n for n in names if format_name in result['policy'].get(n, ())), None)


def _check_fields(content, fields, path, prefix=''):
  """Raises ConfigError where a field is missing or of another type."""
  for name, expected in fields.items():
    value = content.get(name)
    nested = isinstance(expected, dict)
    usable = isinstance(value, dict if nested else expected)
    if not usable or (isinstance(value, float) and not math.isfinite(value)):
      raise ConfigError(f'{str(path)!r} is damaged: it has no usable {prefix + name!r}')
    if nested:
      _check_fields(value, expected, path, f'{prefix}{name}.')


def _check_tables(result, path):
  """Checks what is there for each layer, decision or format, and what may be absent."""
  for name in ('layers', 'architecture', 'sensitivities'):
    if not isinstance(result.get(name, {}), dict):
      raise ConfigError(f'{str(path)!r} is damaged: it has no usable {name!r}')
  tables = [result['uniform_costs'], *result['policy'].values()]
  tables += result.get('sensitivities', {}).values()
  for name, layer in result.get('layers', {}).items():
    if not isinstance(layer, dict):
      raise ConfigError(f'{str(path)!r} is damaged: layer {name!r} is no object')
    _check_fields(layer, _LAYER_FIELDS, path, f'layers.{name}.')
    if 'decisions' in layer:
      _check_fields(layer, {'decisions': _DECISIONS_FIELD}, path, f'layers.{name}.')
    tables.append(layer['uniform_costs'])
  for table in tables:
    if not _is_table(table) or not all(map(math.isfinite, table.values())):
      raise ConfigError(f'{str(path)!r} is damaged: expected numbers by format')
  front = result.get('front', [])
  if not isinstance(front, list) or not all(isinstance(p, dict) for p in front):
    raise ConfigError(f"{str(path)!r} is damaged: it has no usable 'front'")
  for point in front:
    _check_fields(point, _POINT_FIELDS, path, 'front.')
  if result.get('target') is not None:
    _check_fields(result, {'target': _NUMBER}, path)


def _check_row(row, path):
  policy = row.get('policy')
  scalars = {name: value for name, value in row.items() if name != 'policy'}
  usable = isinstance(policy, dict) and all(map(_is_table, policy.values()))
  if not usable or not _is_table(scalars):
    raise ConfigError(f'{str(path)!r} is damaged: step {row["step"]!r} is unusable')


def _is_table(value):
  return isinstance(value, dict) and all(
    isinstance(number, _NUMBER) for number in value.values()
  )
