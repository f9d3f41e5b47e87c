"""A front from one run: several targets that share the steps before the commitment.

The supernet trains and is measured once, with a policy for each target. From the
commitment on each target has a run of its own, whose weights finish under its formats.
With the default strategy the steps that are shared are a third of all.
"""

from collections.abc import Callable, Mapping, Sequence
import logging
from typing import Any

from etils import epath
import jax
import ml_collections

from fliqs_jax.runs import files, loop, preparation, targets, workdir
from fliqs_jax.runs.config import resolve
from fliqs_jax.runs.result import write_json
from fliqs_jax.runs.setup import Setup
from fliqs_jax.runs.sweep import PARETO_FILE, Point, read_points, workdir_name

SHARED_FOLDER = 'shared'

_logger = logging.getLogger(__name__)


def is_front(config: ml_collections.ConfigDict) -> bool:
  """Returns whether a config asks for all of its targets and not for one of them."""
  search = config.search
  several = bool(search.targets) and search.target_index is None
  return config.mode == 'search' and several


def plan(config: ml_collections.ConfigDict) -> dict[str, ml_collections.ConfigDict]:
  """Returns the resolved config of each target's run, by the name of its workdir.

  Raises:
    ConfigError: where one of the targets is none.
  """
  runs = {}
  for index in range(len(targets.split(config.search.targets))):
    run = config.copy_and_resolve_references()
    run.search.target_index = index
    run = resolve(run)
    runs[workdir_name(run)] = run
  return runs


def run(
  config: ml_collections.ConfigDict,
  folder: epath.PathLike,
  draw: Callable[[epath.Path, Sequence[Point]], None],
  allow_config_change: bool = False,
) -> list[Point]:
  """Searches for all targets of a config; the same call goes on where it stopped.

  Args:
    config: unresolved, with `search.targets`.
    folder: in which each target's run has its workdir, made if it is not there.
    draw: draws the points into the folder.
    allow_config_change: resume although the config in the folder differs.

  Returns:
    The points, as in `pareto.json`.

  Raises:
    ConfigError, RunError, FloatingPointError, Preempted: as `loop.run`.
  """
  folder = files.to_path(folder)
  setups = {
    name: preparation.prepare(run, folder / name, allow_config_change)
    for name, run in plan(config).items()
  }
  train(setups, folder, allow_config_change)
  points = read_points(folder)
  if jax.process_index() == 0:
    write_json(folder / PARETO_FILE, points)
    draw(folder, points)
  return points


def train(
  setups: Mapping[str, Setup], folder: epath.Path, allow_config_change: bool = False
) -> dict[str, dict[str, Any]]:
  """Trains what was prepared; returns the results by the names of the workdirs.

  Args:
    setups: of each target's run, by the name of its workdir.
    folder: of all.
    allow_config_change: go on from shared steps although their config differs.

  Raises:
    ConfigError: where the folder holds shared steps of another config or network.
  """
  shared, first = folder / SHARED_FOLDER, next(iter(setups.values()))
  workdir.check(first.config, shared, allow_config_change)
  workdir.check_layers(first.standard_layers, shared)
  _logger.info('Steps before the commitment, for %d targets', len(setups))
  loop.train_to_commitment(first, shared)
  results = {}
  for count, (name, setup) in enumerate(setups.items(), 1):
    _logger.info('Target %d/%d: %s', count, len(setups), name)
    results[name] = loop.train(setup, folder / name, shared)
  return results
