"""The paper's analysis of a network: its figures, and the numbers behind them."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from etils import epath
from flax import traverse_util
import jax
from matplotlib.figure import Figure
import ml_collections
import numpy as np

from fliqs_jax.errors import ConfigError
from fliqs_jax.numerics import quantization_error
from fliqs_jax.numerics.formats import get_format
from fliqs_jax.reporting import analysis_figures
from fliqs_jax.reporting.recorded_run import Run, read_run
from fliqs_jax.reporting.rendering import to_png
from fliqs_jax.runs import evaluation, files, loop
from fliqs_jax.runs import setup as setup_lib
from fliqs_jax.runs.config import resolve
from fliqs_jax.runs.quality import from_evaluation
from fliqs_jax.runs.result import write_json
from fliqs_jax.runs.workdir import check_model
from fliqs_jax.search import options
from fliqs_jax.search.quantities import counted_bits
from fliqs_jax.training.sharding import make_mesh

FIGURES = ('switching', 'clipping', 'entropy', 'formats')
ENTROPY_WEIGHTS = (0.0, 0.01, 0.1, 1.0)


def write_figures(
  config: ml_collections.ConfigDict,
  folder: str,
  names: Sequence[str],
  run_folders: Sequence[str],
) -> Iterator[tuple[str, epath.Path]]:
  """Writes figures as PNG and their numbers as JSON; yields each name and its PNG.

  Args:
    config: unresolved.
    folder: of the files and of the searches of `entropy`.
    names: of `FIGURES`.
    run_folders: finished runs, the weights of the first and the formats of all.

  Raises:
    ConfigError: where a workdir is unusable or the folder cannot be made.
  """
  resolved, folder = resolve(config), files.to_path(folder)
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise ConfigError(f'--folder={folder}: {error.strerror or error}') from None
  for name in names:
    # The searches of `entropy` fill in for their strategy what is left open.
    needed = config if name == 'entropy' else resolved
    numbers, figure = _make(name, needed, folder, run_folders)
    write_json(folder / f'{name}.json', numbers)
    path = folder / f'{name}.png'
    path.write_bytes(to_png(figure))
    yield name, path


def _make(name, config, folder, given) -> tuple[Any, Figure]:
  """Returns the numbers of a figure and the figure."""
  if name in ('switching', 'clipping'):
    names = options.format_names(options.parse(config.search.formats))
    weights = network_weights(config, given[0] if given else None)
    if name == 'switching':
      numbers = switching(weights, names)
      errors = np.array(numbers['errors'])
      return numbers, analysis_figures.switching(names, errors)
    numbers = clipping(weights, names)
    return numbers, analysis_figures.clipping(numbers)
  if name == 'entropy':
    numbers = entropy(config, folder)
    return numbers, analysis_figures.entropy(numbers)
  searched = given or [
    workdir
    for weight in ENTROPY_WEIGHTS
    if (workdir := _entropy_workdir(folder, weight)).exists()
  ]
  if not searched:
    raise ConfigError('formats: expected finished searches, as --workdir=runs/digits')
  numbers = formats_by_depth([read_run(workdir) for workdir in searched])
  return numbers, analysis_figures.formats_by_depth(numbers)


def network_weights(
  config: ml_collections.ConfigDict, workdir: str | None
) -> dict[str, jax.Array]:
  """Returns the weights of the searched layers, by path.

  Args:
    config: resolved.
    workdir: of a run of the same network; None for the weights before training.

  Raises:
    ConfigError: where the workdir holds no checkpoint of this network.
  """
  if workdir:
    check_model(config, files.to_path(workdir))
  setup = setup_lib.build(config, jax.device_count(), 'float32')
  if workdir:
    state, _ = evaluation.restored_state(setup, files.to_path(workdir))
  else:
    state = evaluation.initial_state(setup, make_mesh(1), config.seed)
  params = traverse_util.flatten_dict(state.params, sep='/')
  return {layer.path: params[f'{layer.path}/kernel'] for layer in setup.space.layers}


def switching(weights: Mapping[str, jax.Array], names: Sequence[str]) -> dict[str, Any]:
  """Returns the switching errors between formats, ready for JSON."""
  errors = quantization_error.switching_errors(list(weights.values()), names)
  return {'formats': list(names), 'errors': errors.tolist()}


def clipping(weights: Mapping[str, jax.Array], names: Sequence[str]) -> dict[str, Any]:
  """Returns errors against thresholds, of normal data and the weights, for JSON."""
  thresholds = np.geomspace(0.6, 20, 120)
  data = {
    'Normal data': [quantization_error.normal_values()],
    'The network’s weights': list(weights.values()),
  }
  panels = {}
  for title, tensors in data.items():
    panels[title] = {}
    for name in names:
      if get_format(name).clip > 0:
        errors = quantization_error.clipping_errors(tensors, name, thresholds)
        best = quantization_error.best_threshold(errors)
        panels[title][name] = {
          'thresholds': thresholds.tolist(),
          'errors': errors.tolist(),
          'best': best,
          'best_threshold': float(thresholds[best]),
          'threshold_in_use': float(get_format(name).clip),
        }
  return panels


def entropy(config: ml_collections.ConfigDict, folder: epath.Path) -> list[dict]:
  """Searches with several entropy weights, and returns how each went, for JSON.

  Args:
    config: unresolved. The strategy is the policy gradient, whose weight it is: under
      any other all searches would be the same.
    folder: in which each search has a workdir.
  """
  rows = []
  for weight in ENTROPY_WEIGHTS:
    changed = config.copy_and_resolve_references()
    changed.search.strategy = 'policy_gradient'
    changed.controller.entropy_weight = weight
    workdir = _entropy_workdir(folder, weight)
    result = loop.run(changed, workdir)
    history, reached = read_run(workdir).history, from_evaluation(result['eval'])
    rows.append(
      {
        'weight': weight,
        'steps': [row['step'] for row in history],
        'entropy': [row['entropy'] for row in history],
        reached.key: reached.value,
        'standard_error': reached.error,
        'cost_ratio': result['cost'] / result['target'],
      }
    )
  return rows


def formats_by_depth(found: Sequence[Run]) -> list[dict[str, Any]]:
  """Returns the mean bits of each layer over finished runs of one network, for JSON.

  Raises:
    ConfigError: where a run is not finished, or of other layers than the first.
  """
  for run in found:
    if not run.result:
      raise ConfigError(f'{str(run.workdir)!r} holds no finished run')
    if list(run.result['formats']) != list(found[0].result['formats']):
      raise ConfigError(f'{str(run.workdir)!r} holds a run of another network')
  return [
    {
      'path': path,
      'kind': found[0].result.get('layers', {}).get(path, {}).get('kind', 'layer'),
      'bits': float(
        np.mean([counted_bits(run.result['formats'][path]['weights']) for run in found])
      ),
    }
    for path in found[0].result['formats']
  ]


def _entropy_workdir(folder, weight):
  return folder / f'entropy_weight_{weight:g}'
