"""The uniform model that a search is held against: the widest one within its target."""

from collections.abc import Mapping
from typing import Any

from etils import epath
import ml_collections

from fliqs_jax.errors import ConfigError
from fliqs_jax.runs import again, files
from fliqs_jax.runs.config import resolve
from fliqs_jax.runs.result import RESULT_FILE, read_result
from fliqs_jax.runs.validation import OWN_BATCHES
from fliqs_jax.runs.workdir import read_config

# Fields that a search fills in by its strategy, and a training by another one.
_PHASES = ('weight_delay', 'activation_delay', 'policy_delay', 'commit_step')


def widest_format(result: Mapping[str, Any]) -> str | None:
  """Returns the format whose uniform model costs most within a result's target.

  The cheapest where none is within it, and None for what was not searched. Of formats
  that cost the same it is the first.
  """
  costs, target = result['uniform_costs'], result.get('target')
  if not costs or target is None:
    return None
  within = [name for name in costs if costs[name] <= target * (1 + 1e-9)]
  return max(within, key=costs.get, default=min(costs, key=costs.get))


def folder(workdir: epath.Path, name: str) -> epath.Path:
  """Returns the folder, in that of a search, of the uniform model in a format."""
  return workdir / f'uniform_{name}'


def plan(workdir: str) -> tuple[ml_collections.ConfigDict, epath.Path]:
  """Returns the config and the folder of the training beside a finished search.

  It has the search's config, but for the phases that its strategy filled in.

  Raises:
    ConfigError: where there is no such search, or its network and batches are a Python
      program's.
  """
  path = files.to_path(workdir)
  found = read_config(path)
  if found.mode != 'search' or not (path / RESULT_FILE).exists():
    raise ConfigError(
      f'{workdir!r} holds no finished search: expected one, whose target says which '
      'uniform model stands beside it'
    )
  name = widest_format(read_result(path / RESULT_FILE))
  if found.dataset == OWN_BATCHES:
    raise ConfigError(
      f'{workdir!r} was made by fliqs_jax.search, whose network and data it does not '
      f'hold: expected fliqs_jax.train(..., formats={name!r}, workdir=...) in Python, '
      'and its folder as a further --workdir'
    )
  config = again.get_config(workdir)
  left_open = config.copy_and_resolve_references()
  left_open.search.update(dict.fromkeys(_PHASES))
  by_strategy = resolve(left_open).search
  for phase in _PHASES:
    if config.search[phase] == by_strategy[phase]:
      config.search[phase] = None
  config.update(mode='train', formats=name)
  return config, folder(path, name)
