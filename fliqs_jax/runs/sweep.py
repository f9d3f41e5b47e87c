"""A sweep: searches and uniform models, one after the other, and their Pareto front."""

from collections.abc import Callable, Sequence
import logging
from typing import Any

from etils import epath
import jax
import ml_collections

from fliqs_jax.errors import ConfigError, Preempted
from fliqs_jax.runs import files, loop, preparation, quality
from fliqs_jax.runs import targets as targets_lib
from fliqs_jax.runs.config import resolve
from fliqs_jax.runs.pareto import pareto_front
from fliqs_jax.runs.result import RESULT_FILE, read_result, write_json
from fliqs_jax.search import options

PARETO_FILE = 'pareto.json'

# What the runs of a folder must share, for one figure to show them.
_SHARED = ('model', 'dataset', 'cost_model', 'steps')

_logger = logging.getLogger(__name__)

Point = dict[str, Any]


def sweep(
  config: ml_collections.ConfigDict,
  folder: str,
  targets: Sequence[str],
  widths: Sequence[str],
  draw: Callable[[epath.Path, Sequence[Point]], None],
) -> tuple[list[Point], list[str]]:
  """Runs what is not finished yet, and rewrites the files of the sweep after each run.

  Args:
    config: unresolved, of the searches.
    folder: in which each run has its workdir, made if it is not there.
    targets: each a format, SCALE*FORMAT, or a number in the cost model's unit.
    widths: multipliers as text; none for the config's own.
    draw: draws the points into the folder.

  Returns:
    The points of all finished runs in the folder, as in `pareto.json`, and the names of
    the runs that failed.

  Raises:
    ConfigError: with all that is wrong, before the first run.
    Preempted: where SIGTERM or SIGINT stopped a run; the same call goes on.
  """
  folder = files.to_path(folder)
  runs = _prepare(config, folder, targets, widths)
  failed = []
  for count, (name, run) in enumerate(runs.items(), 1):
    _logger.info('Run %d/%d: %s', count, len(runs), name)
    try:
      loop.run(run, folder / name)
    except Preempted:
      raise  # the others are to stop too
    except Exception as error:  # whatever befell one run, the others go on
      reason = next(iter(str(error).splitlines()), type(error).__name__)
      _logger.error('error: %s failed: %s', name, reason)
      failed.append(name)
    else:
      if jax.process_index() == 0:
        points = read_points(folder)
        write_json(folder / PARETO_FILE, points)
        draw(folder, points)
  return read_points(folder), failed


def _prepare(config, folder, targets, widths):
  """Returns the runs of a sweep after all checks, or raises all problems."""
  problems = (
    [] if targets else ['no targets: expected FORMAT, SCALE*FORMAT or a number']
  )
  if config.mode != 'search' or config.formats:
    problems.append(
      f'mode={config.mode!r}, formats={config.formats!r}: expected search and none; a '
      'sweep searches for each target and trains in each format'
    )
  if config.search.targets:
    problems.append(
      f'search.targets={config.search.targets!r}: expected --targets of the sweep alone'
    )
  targets = _parse(targets_lib.parse, 'target', targets, problems)
  widths = _parse(targets_lib.positive, 'width', widths, problems)
  try:
    runs = plan(config, targets, widths or [config.model.width])
  except ConfigError as error:
    raise ConfigError(*problems, *error.problems) from None
  found = {}  # problem -> the runs that have it
  for name, run in runs.items():
    try:
      preparation.prepare(run, folder / name)
    except ConfigError as error:
      for problem in error.problems:
        # Without the run's name, problems of many runs are one.
        problem = problem.replace(str(folder / name), str(folder))
        found.setdefault(problem, []).append(name)
  for problem, names in found.items():
    others = f' and {len(names) - 1} more' if names[1:] else ''
    problems.append(
      problem if len(names) == len(runs) else f'{names[0]}{others}: {problem}'
    )
  problems += _check_folder(folder, config)
  if problems:
    raise ConfigError(*problems)
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    reason = error.strerror or error
    raise ConfigError(f'folder {str(folder)!r} cannot be made: {reason}') from None
  return runs


def _parse(parse: Callable, what: str, texts: Sequence[str], problems: list[str]):
  """Returns what the texts say, each once; adds a line for each that says nothing."""
  parsed = []
  for text in texts:
    try:
      value = parse(text)
    except ConfigError as error:
      problems.append(f'{what} {text!r}: {error}')
    else:
      parsed += [value] * (value not in parsed)
  return parsed


def plan(
  config: ml_collections.ConfigDict,
  targets: Sequence[dict[str, Any]],
  widths: Sequence[float],
) -> dict[str, ml_collections.ConfigDict]:
  """Returns the config of every run, by the name of its workdir.

  At each width, the uniform models in all formats of the search and of the targets, and
  the searches.

  Args:
    config: of the searches, unresolved.
    targets: from `targets.parse`.
    widths: multipliers.
  """
  uniform = dict.fromkeys(
    (
      *options.parse(resolve(config).search.formats),
      *(target['target_format'] for target in targets if 'target_format' in target),
    )
  )
  changes = [
    *({'mode': 'train', 'formats': name} for name in uniform),
    *({'mode': 'search', 'formats': '', 'search': target} for target in targets),
  ]
  runs = {}
  for width in widths:
    for change in changes:
      run = config.copy_and_resolve_references()
      run.update({**change, 'model': {'width': width}})
      run = resolve(run)
      runs[workdir_name(run)] = run
  return runs


def workdir_name(config: ml_collections.ConfigDict) -> str:
  """Returns the name of the workdir of a run of a sweep or a front."""
  kind, target = _describe(config)
  return f'{kind}-{target.replace("*", "x")}-width{config.model.width:.15g}'


def _describe(config):
  """Returns the kind of a run, and its target or its one format."""
  if config.mode == 'train':
    return 'uniform', config.formats
  return 'searched', targets_lib.describe(config.search)


def _check_folder(folder, config):
  """Returns what is wrong with a folder for a sweep of this config, in lines."""
  if folder.exists() and not folder.is_dir():
    return [f'folder {str(folder)!r} is a file: expected a folder']
  ours = config.model.name, config.dataset, config.search.cost_model, config.num_steps
  for path in _finished(folder):
    try:
      result = read_result(path)
    except ConfigError as error:
      return error.problems
    theirs = tuple(result[field] for field in _SHARED)
    if theirs != ours:
      return [
        f'folder {str(folder)!r} holds another sweep: {dict(zip(_SHARED, theirs))} '
        f'there, {dict(zip(_SHARED, ours))} here; name another --folder'
      ]
  return []


def _finished(folder):
  return sorted(folder.glob(f'*-width*/{RESULT_FILE}'))


def read_points(folder: epath.Path) -> list[Point]:
  """Returns the points of the finished runs in a sweep's folder, cheapest first.

  Each has `kind` (`searched` or `uniform`), `target` (as given, or the uniform format),
  `width`, `cost`, `cost_unit`, `workdir` (its name in the folder), `on_front`,
  `accuracy` (a fraction), or what else the task is judged by, and its `standard_error`
  over examples (None where it is unknown), `model`, `dataset`, `steps` and `seed`.
  """
  points = []  # pairs (point, merit)
  for path in _finished(folder):
    result = read_result(path)
    config = ml_collections.ConfigDict(result['config'])
    kind, target = _describe(config)
    reached = quality.from_evaluation(result['eval'])
    point = {
      'kind': kind,
      'target': target,
      'width': config.model.width,
      'cost': result['cost'],
      'cost_unit': result['cost_unit'],
      reached.key: reached.value,
      'standard_error': reached.error,
      'model': result['model'],
      'dataset': result['dataset'],
      'steps': config.num_steps,
      'seed': config.seed,
      'workdir': path.parent.name,
    }
    points.append((point, reached.merit))
  points.sort(key=lambda pair: (pair[0]['cost'], -pair[1]))
  front = pareto_front([(point['cost'], merit) for point, merit in points])
  return [point | {'on_front': on} for (point, _), on in zip(points, front)]
