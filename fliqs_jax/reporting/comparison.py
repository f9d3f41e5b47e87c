"""Runs beside each other: which compare, and by what."""

from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from fliqs_jax.reporting.recorded_run import Run, read_run
from fliqs_jax.runs import baseline
from fliqs_jax.runs.pareto import pareto_front
from fliqs_jax.runs.workdir import CONFIG_FILE


def comparable(runs: Sequence[Run]) -> list[Run]:
  """Returns the finished runs whose costs and qualities mean the same as the first's.

  On one dataset, in one cost model; networks and their widths may differ.
  """
  finished = [run for run in runs if run.result]
  return [run for run in finished if _yardstick(run) == _yardstick(finished[0])]


def points(runs: Sequence[Run]) -> list[dict[str, Any]]:
  """Returns the points of comparable runs, as `pareto_figure.pareto` takes them."""
  values = [(run.result['cost'], run.quality.merit) for run in runs]
  return [
    {
      'kind': run.kind,
      'label': run.label,
      'group': run.network,
      'cost': cost,
      'quality': run.quality.value,
      'error': run.quality.error,
      'on_front': on_front,
    }
    for run, (cost, _), on_front in zip(runs, values, pareto_front(values))
  ]


def with_baselines(runs: Sequence[Run]) -> list[Run]:
  """Returns runs, and the uniform models that were trained in their folders."""
  found = list(runs)
  given = {run.workdir.absolute() for run in runs}
  for run in runs:
    path = baseline_folder(run)
    if path and (path / CONFIG_FILE).exists() and path.absolute() not in given:
      uniform = read_run(str(path))
      found.append(uniform._replace(label=f'{run.label}/{uniform.label}'))
  return found


def baseline_folder(run: Run) -> epath.Path | None:
  """Returns where the uniform model of a run's target is trained; None without one."""
  name = baseline.widest_format(run.result) if run.result else None
  return baseline.folder(run.workdir, name) if name else None


def title(runs: Sequence[Run]) -> str:
  """Returns what a figure of comparable runs is called: networks and dataset."""
  networks = list(dict.fromkeys(run.network for run in runs))
  more = f' and {len(networks) - 2} more' if networks[2:] else ''
  return f'{"; ".join(networks[:2])}{more} on {runs[0].result["dataset"]}'


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


def _yardstick(run):
  result = run.result
  device = run.config['search'].get('device')
  on_device = device if result['cost_model'] == 'roofline' else None
  costs = result['cost_model'], result['cost_unit'], on_device
  return result['dataset'], run.quality.name, *costs
