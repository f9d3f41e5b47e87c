"""Targets as a user writes them: FORMAT, SCALE*FORMAT, or a number."""

from collections.abc import Mapping, Sequence
import math
from typing import Any

import ml_collections

from fliqs_jax.errors import ConfigError
from fliqs_jax.layers.layer import Layer
from fliqs_jax.search import options
from fliqs_jax.search.cost_models import CostModel


def split(targets: Sequence[str | float]) -> tuple[str, ...]:
  """Returns targets as texts; one text may hold several, with commas between them."""
  return tuple(t.strip() for given in targets for t in str(given).split(','))


def parse(text: str) -> dict[str, Any]:
  """Returns the fields of `config.search` that say what a target is.

  Args:
    text: FORMAT, SCALE*FORMAT, or a number in the cost model's unit.

  Raises:
    ConfigError: where it is none of these.
  """
  scale, times, name = map(str.strip, text.rpartition('*'))
  if not times and not name[:1].isalpha():
    return {'target': positive(text)}
  name = options.find(name)
  target_scale = positive(scale) if times else 1.0
  return {'target': None, 'target_format': name, 'target_scale': target_scale}


def positive(text: str) -> float:
  """Returns the number above 0 that a text is.

  Raises:
    ConfigError: where it is none.
  """
  try:
    number = float(text)
  except ValueError:
    number = math.nan
  if not 0 < number < math.inf:
    raise ConfigError('expected a number above 0')
  return number


def limit(
  fields: Mapping[str, Any], cost_model: CostModel, layers: tuple[Layer, ...]
) -> float:
  """Returns a target in the cost model's unit.

  Args:
    fields: `config.search`, or what `parse` returns.
    cost_model: that of the target.
    layers: of the standard network, a multiple of whose cost may be the target.
  """
  if fields['target'] is not None:
    return fields['target']
  uniform = cost_model.uniform(layers, fields['target_format'])
  return fields['target_scale'] * uniform


def describe(search: ml_collections.ConfigDict) -> str:
  """Returns the target of a config as a user would write it."""
  if search.target is not None:
    return f'{search.target:.15g}'
  scale = '' if search.target_scale == 1 else f'{search.target_scale:.15g}*'
  return scale + search.target_format
