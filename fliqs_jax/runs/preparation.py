"""Preparation of a run: all that it needs is found before anything is written."""

import functools

from etils import epath
import jax
import ml_collections

from fliqs_jax.errors import ConfigError, Problems
from fliqs_jax.runs import files, hugging_face, pretrained, supernet, workdir
from fliqs_jax.runs.network import Architecture, own_variables
from fliqs_jax.runs.setup import Data, Setup, build
from fliqs_jax.runs.validation import trains_nothing
from fliqs_jax.search.assignments import Assignment
from fliqs_jax.training.train_state import Variables


def prepare(
  config: ml_collections.ConfigDict,
  folder: epath.Path,
  allow_config_change: bool = False,
) -> Setup:
  """Returns what a run needs, with its data; prepares a packaged dataset.

  Args:
    config: resolved, to search or to train.
    folder: the run's, in which nothing is written.
    allow_config_change: accept a folder whose config differs.

  Raises:
    ConfigError: with all that stands in the way of the run.
  """
  problems = Problems()
  formats = problems.attempt(fixed_formats, config)
  if config.mode == 'train':
    formats = formats or 'float32'
  architecture = problems.attempt(supernet.read_architecture, config)
  setup = attempt_build(problems, config, formats, architecture)
  start = attempt_start(problems, config, setup)
  problems.attempt(workdir.check, config, folder, allow_config_change)
  data = configured_data(problems, config)
  return setup._replace(data=data, start=start)


def fixed_formats(config: ml_collections.ConfigDict) -> str | Assignment | None:
  """Returns the formats of a training; None for a search.

  Raises:
    ConfigError: where the config has them for a search, or none for a training.
  """
  if config.mode == 'search' and config.formats:
    raise ConfigError(
      f'formats={config.formats!r} would have no effect on a search: expected them '
      'with --config.mode=train or eval'
    )
  if config.mode == 'train' and not config.formats:
    raise ConfigError(
      'mode=train: expected formats, as --config.formats=int8, float32 for none, or '
      'the path of a formats.json or a search_result.json'
    )
  return files.read_formats(config.formats) if config.formats else None


def attempt_build(
  problems: Problems,
  config: ml_collections.ConfigDict,
  formats: str | Assignment | None,
  architecture: Architecture | None,
) -> Setup | None:
  """Builds in spite of earlier problems, which are those of None, to find all."""
  if architecture is None:
    # What else is wrong shows in the standard network, which has any one format.
    architecture, formats = {}, 'float32'
  devices = jax.device_count()
  return problems.attempt(build, config, devices, formats, architecture=architecture)


def attempt_start(
  problems: Problems,
  config: ml_collections.ConfigDict,
  setup: Setup | None,
  given: Variables | None = None,
) -> Variables | None:
  """Returns the variables to start from: given ones, or those that the config names."""
  if given is not None and config.init_from:
    problems.add(f'variables and init_from={config.init_from!r}: expected one of them')
  start, of_its_sizes = given, True
  if given is None:
    start = problems.attempt(pretrained.read, config.init_from)
    of_its_sizes = problems.attempt(hugging_face.check_sizes, config)
  # Of another network, each leaf would be named.
  if setup and start is not None and of_its_sizes:
    problems.attempt(pretrained.check, setup.model, setup.example, start)
  named = given is not None or config.init_from
  without = not named and setup and own_variables(setup.model, setup.example) is None
  if without and trains_nothing(config):
    problems.add(
      'num_steps=0: expected trained weights, in init_from=DIR or, in Python, as '
      'variables, since a search without training takes those that it is given'
    )
  return start


def configured_data(problems: Problems, config: ml_collections.ConfigDict) -> Data:
  """Returns the batches of the config's dataset.

  Raises:
    ConfigError: with all problems that were met so far, those of the dataset too.
  """
  # Imported here, since it takes seconds and own batches do without.
  from fliqs_jax.data import pipeline

  builder = problems.attempt(pipeline.find_builder, config)
  problems.raise_any()
  problems.attempt(pipeline.prepare, config, builder)
  problems.raise_any()
  return Data(
    functools.partial(pipeline.train_batches, config, builder),
    functools.partial(pipeline.eval_batches, config, builder),
  )
