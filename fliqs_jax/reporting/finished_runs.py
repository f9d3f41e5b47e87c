"""Runs as their workdirs tell of them, and how several compare."""

from collections.abc import Mapping, Sequence
import math
from typing import Any, NamedTuple

from etils import epath

from fliqs_jax.reporting import quality as quality_lib
from fliqs_jax.runs import result as results
from fliqs_jax.runs import workdir as workdirs

_NUMBER = (int, float)

# What a report needs of a result: fields by type, of the entries of a mapping too.
_RESULT_FIELDS = {
  'model': str, 'dataset': str, 'cost_model': str, 'cost_unit': str, 'cost': _NUMBER,
  'formats': dict, 'eval': {'loss': _NUMBER, 'num_examples': int},
  'uniform_costs': dict, 'policy': dict, 'versions': dict, 'config': dict,
}  # fmt: skip
_LAYER_FIELDS = {
  'kind': str, 'macs': int, 'params': int, 'cost': _NUMBER, 'uniform_costs': dict
}  # fmt: skip
_CONFIG_FIELDS = {
  'mode': str, 'num_steps': int, 'dataset': str, 'model': {'name': str},
  'search': {
    'activation_delay': int, 'policy_delay': int, 'commit_step': int,
    'hard_budget': bool,
  },
}  # fmt: skip


class Run(NamedTuple):
  """What the folder of a run holds."""

  workdir: epath.Path
  label: str  # the folder's name
  config: dict[str, Any]
  history: list[dict[str, Any]]
  result: dict[str, Any] | None  # None where the run is not finished

  @property
  def kind(self) -> str:
    """What the formats are: searched, uniform, or otherwise fixed."""
    if self.config['mode'] == 'search':
      return 'searched'
    return 'uniform' if self.uniform_format else 'fixed'

  @property
  def network(self) -> str:
    """What the network is called, with its width where it has one."""
    model = self.config['model']
    width = None if self.made_in_python else model.get('width')
    return model['name'] + (f', width {width:g}' if width else '')

  @property
  def made_in_python(self) -> bool:
    """Whether `fliqs_jax.search` made it, whose network no config can name."""
    return 'layers' in self.config['model']

  @property
  def quality(self) -> quality_lib.Quality:
    """What the evaluation of a finished run says of it."""
    return quality_lib.of(self.result['eval'])

  @property
  def uniform_format(self) -> str | None:
    """The format that all layers of a finished run have, if they have one."""
    assigned = self.result['formats'].values() if self.result else ()
    names = {name for operands in assigned for name in operands.values()}
    return names.pop() if len(names) == 1 else None


def read_run(workdir: str) -> Run:
  """Returns the run in a folder, finished or not.

  Raises:
    ValueError: where the folder holds none, or a file in it is damaged; one line.
  """
  folder = epath.Path(workdir)
  config = workdirs.read_config(folder).to_dict()
  _check_fields(config, _CONFIG_FIELDS, folder / workdirs.CONFIG_FILE)
  history = workdirs.read_history(folder)
  for row in history:
    _check_row(row, folder / workdirs.HISTORY_FILE)
  path, result = folder / results.RESULT_FILE, None
  if path.exists():
    result = results.read_result(path)
    _check_fields(result, _RESULT_FIELDS, path)
    _check_tables(result, path)
  return Run(folder, folder.absolute().name, config, history, result)


def comparable(runs: Sequence[Run]) -> list[Run]:
  """Returns the finished runs whose costs and qualities mean the same as the first's.

  On one dataset, in one cost model; networks and their widths may differ.
  """
  finished = [run for run in runs if run.result]
  return [run for run in finished if _measure(run) == _measure(finished[0])]


def points(runs: Sequence[Run]) -> list[dict[str, Any]]:
  """Returns the points of comparable runs, as `pareto_figure.pareto` takes them."""
  values = [(run.result['cost'], run.quality.value) for run in runs]
  return [
    {
      'kind': run.kind,
      'label': run.label,
      'group': run.network,
      'cost': cost,
      'quality': quality,
      'on_front': on_front,
    }
    for run, (cost, quality), on_front in zip(runs, values, pareto_front(values))
  ]


def pareto_front(pairs: Sequence[tuple[float, float]]) -> list[bool]:
  """Returns which pairs (cost, quality) are on the Pareto front.

  On it is what no other pair beats in one of the two and at least equals in the other;
  equal pairs are on it together.
  """
  best = set()  # pairs on the front, from the cheapest on
  highest = -math.inf
  for cost, quality in sorted(pairs, key=lambda pair: (pair[0], -pair[1])):
    if quality > highest:
      highest = quality
      best.add((cost, quality))
  return [tuple(pair) in best for pair in pairs]


def uniform_runs(run: Run, runs: Sequence[Run]) -> dict[str, Run]:
  """Returns the runs of the same network with one format in all layers, by format."""
  return {
    other.uniform_format: other
    for other in comparable([run, *runs])
    if other.kind == 'uniform' and other.config['model'] == run.config['model']
  }


def reference_format(result: Mapping[str, Any]) -> str | None:
  """Returns the uniform model whose cost is nearest to the target's, if there is one.

  Formats of one width cost the same; the first of them that is named is taken.
  """
  costs, target = result['uniform_costs'], result.get('target')
  if not costs or target is None:
    return None
  return min(costs, key=lambda name: abs(costs[name] - target))


def _measure(run):
  result = run.result
  device = run.config['search'].get('device')
  on_device = device if result['cost_model'] == 'roofline' else None
  costs = result['cost_model'], result['cost_unit'], on_device
  return result['dataset'], run.quality.name, *costs


def _check_fields(content, fields, path, prefix=''):
  """Raises ValueError where a field is missing or of another type."""
  for name, expected in fields.items():
    value = content.get(name)
    nested = isinstance(expected, dict)
    usable = isinstance(value, dict if nested else expected)
    if not usable or (isinstance(value, float) and not math.isfinite(value)):
      raise ValueError(f'{str(path)!r} is damaged: it has no usable {prefix + name!r}')
    if nested:
      _check_fields(value, expected, path, f'{prefix}{name}.')


def _check_tables(result, path):
  """Checks what is there for each layer, decision or format, and what may be absent."""
  for name in ('layers', 'architecture'):
    if not isinstance(result.get(name, {}), dict):
      raise ValueError(f'{str(path)!r} is damaged: it has no usable {name!r}')
  tables = [result['uniform_costs'], *result['policy'].values()]
  for name, layer in result.get('layers', {}).items():
    if not isinstance(layer, dict):
      raise ValueError(f'{str(path)!r} is damaged: layer {name!r} is no object')
    _check_fields(layer, _LAYER_FIELDS, path, f'layers.{name}.')
    tables.append(layer['uniform_costs'])
  for table in tables:
    if not _is_table(table) or not all(map(math.isfinite, table.values())):
      raise ValueError(f'{str(path)!r} is damaged: expected numbers by format')
  if result.get('target') is not None:
    _check_fields(result, {'target': _NUMBER}, path)


def _check_row(row, path):
  policy = row.get('policy')
  scalars = {name: value for name, value in row.items() if name != 'policy'}
  usable = isinstance(policy, dict) and all(map(_is_table, policy.values()))
  if not usable or not _is_table(scalars):
    raise ValueError(f'{str(path)!r} is damaged: step {row["step"]!r} is unusable')


def _is_table(value):
  return isinstance(value, dict) and all(
    isinstance(number, _NUMBER) for number in value.values()
  )
