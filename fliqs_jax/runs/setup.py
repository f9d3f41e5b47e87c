"""What a run needs, gathered and checked before anything is written."""

from collections.abc import Callable, Iterable
import functools
from typing import Any, NamedTuple

from etils import epath
import grain
import jax
import ml_collections

from fliqs_jax.data import pipeline as input_pipeline
from fliqs_jax.runs import assembly
from fliqs_jax.runs import files
from fliqs_jax.training import task as objectives
from fliqs_jax.runs import pretrained
from fliqs_jax.runs import subnetwork as subnetworks
from fliqs_jax.runs import workdir as workdirs
from fliqs_jax.errors import ConfigError


class Data(NamedTuple):
  """Where a run's batches come from, numpy arrays in dicts."""

  # (seed, sharding) -> this process's part of batches `[S, B, ...]`, in the order that
  # the seed sets. The iterator tells and takes its position.
  train: Callable[[int, jax.sharding.Sharding], grain.DatasetIterator]
  # (sharding) -> its part of batches `[B, ...]` that have each example once.
  evaluation: Callable[[jax.sharding.Sharding], Iterable[objectives.Batch]]


class Plan(NamedTuple):
  """What a run needs besides its config."""

  setup: assembly.Setup
  data: Data
  start: pretrained.Variables | None  # None for random variables


def check(
  config: ml_collections.ConfigDict,
  workdir: epath.Path,
  allow_config_change: bool = False,
) -> Plan:
  """Returns what a run needs; prepares a packaged dataset.

  Args:
    config: resolved, to search or to train.
    workdir: of the run, in which nothing is written.
    allow_config_change: accept a workdir whose config differs.

  Raises:
    ConfigError: with all that stands in the way of the run.
  """
  attempt = Attempts()
  fixed = attempt(_fixed_formats, config)
  if config.mode == 'train':
    fixed = fixed or 'float32'
  architecture = attempt(subnetworks.read_architecture, config)
  if architecture is None:
    # What else is wrong shows in the standard network, which has any one format.
    architecture, fixed = {}, 'float32'
  setup = attempt(assembly.build, config, jax.device_count(), fixed, None, architecture)
  start = check_start(attempt, config, setup)
  attempt(workdirs.check, config, workdir, allow_config_change)
  return Plan(setup, configured_data(config, attempt), start)


def check_start(
  attempt: 'Attempts',
  config: ml_collections.ConfigDict,
  setup: assembly.Setup | None,
  given: pretrained.Variables | None = None,
) -> pretrained.Variables | None:
  """Returns the variables to start from: given ones, or those that the config names."""
  if given is not None and config.init_from:
    attempt.problems.append(
      f'variables and init_from={config.init_from!r}: expected one of them'
    )
  start = attempt(pretrained.read, config.init_from) if given is None else given
  if setup and start is not None:
    attempt(pretrained.check, setup.model, setup.example, start)
  return start


def configured_data(config: ml_collections.ConfigDict, attempt: 'Attempts') -> Data:
  """Returns the batches of the config's dataset.

  Raises:
    ConfigError: with all problems that were met so far, those of the dataset too.
  """
  builder = attempt(input_pipeline.find_builder, config)
  attempt.raise_problems()
  attempt(input_pipeline.prepare, config, builder)
  attempt.raise_problems()
  return Data(
    functools.partial(input_pipeline.train_batches, config, builder),
    functools.partial(input_pipeline.eval_batches, config, builder),
  )


def _fixed_formats(config):
  if config.mode == 'search' and config.formats:
    raise ValueError(
      f'formats={config.formats!r} would have no effect on a search: expected them '
      'with --config.mode=train or eval'
    )
  if config.mode == 'train' and not config.formats:
    raise ValueError(
      'mode=train: expected formats, as --config.formats=int8, float32 for none, or '
      'the path of a formats.json or a search_result.json'
    )
  return files.read_formats(config.formats) if config.formats else None


class Attempts:
  """Calls functions and gathers their problems, to report all of them together."""

  def __init__(self):
    self.problems = []

  def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Returns the function's result, or None where it raises a ValueError."""
    try:
      return function(*args, **kwargs)
    except ValueError as error:
      self.problems += str(error).splitlines()

  def raise_problems(self) -> None:
    """Raises ConfigError where there were problems."""
    if self.problems:
      raise ConfigError(*self.problems)
