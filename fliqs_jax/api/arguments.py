"""Fields of a config by their last names, and formats, as arguments from Python."""

from collections.abc import Mapping
import json
import os

import ml_collections

from fliqs_jax.api.results import Result
from fliqs_jax.errors import ConfigError, not_among
from fliqs_jax.runs.config import default_config
from fliqs_jax.search import assignments

# Where a field that is given by its last name alone is looked for, in this order.
_SECTIONS = ('search', '', 'optimizer', 'reward', 'quantizer', 'controller')
# Those of `search` that a training with fixed formats has too.
_OF_TRAINING = (
  'cost_model', 'device', 'latency_table', 'weight_delay', 'activation_delay',
  'statistics_batches', 'attention_products',
)  # fmt: skip
# Fields that the arguments say, or that only data from TFDS have.
_NOT_FIELDS = (
    'mode', 'batch_size', 'eval_batch_size', 'dataset', 'num_classes', 'dtype',
    'formats', 'checkpoint', 'model', 'input',
)  # fmt: skip


def search_config(config, fields):
  """Returns the config of a search with fields by their last names."""
  config = with_fields(config, fields, field_names('search'))
  if config.reward.split != 'train':
    raise ConfigError(
      f'reward.split={config.reward.split!r}: expected train, since a search in Python '
      'measures the quality on the training batches'
    )
  return config


def with_fields(config, fields, names):
  """Returns a copy of a config with fields that are given by their last names."""
  config, problems = copy_of(config), []
  for name, value in fields.items():
    if name not in names:
      given = f'unknown argument {name!r}'
      problems.append(not_among(given, name, names, 'a field of the config'))
      continue
    if name == 'formats' and isinstance(value, list | tuple):
      value = ','.join(map(str, value))
    try:
      config.update_from_flattened_dict({names[name]: value})
    except (TypeError, ValueError):
      problems.append(_misfit(config, name, names[name], value))
  if problems:
    raise ConfigError(*problems)
  return config


def copy_of(config: ml_collections.ConfigDict | None) -> ml_collections.ConfigDict:
  """Returns a copy of a given config, or the default one.

  Raises:
    ConfigError: where it is none, or lacks sections or fields.
  """
  if config is None:
    return default_config()
  if not isinstance(config, ml_collections.ConfigDict):
    raise ConfigError(
      f'config={_shortened(config)}: expected a config from fliqs_jax.default_config()'
    )
  if lacking := [name for name in default_config() if name not in config]:
    raise ConfigError(
      f'config lacks {", ".join(lacking)}: expected one from fliqs_jax.default_config()'
    )
  return config.copy_and_resolve_references()


def _misfit(config, name, field, value):
  *sections, last = field.split('.')
  for section in sections:
    config = config[section]
  kind = config.get_type(last).__name__
  return f'{name}={_shortened(value)}: expected a value of type {kind}'


def _shortened(value):
  text = ' '.join(repr(value).split())
  return text if len(text) <= _SHOWN else f'{text[:_SHOWN]}…'


_SHOWN = 60  # letters of a value in a message


def field_names(mode):
  """Returns `{name of an argument: field}`; an optimizer's own name is `optimizer`."""
  names, config = {}, default_config()
  for section in reversed(_SECTIONS):
    for name in config[section] if section else config:
      if mode == 'train' and not _trains(section, name):
        continue
      if name == 'name':
        names[section] = f'{section}.name'
      elif section or name not in (*_NOT_FIELDS, *_SECTIONS):
        names[name] = f'{section}.{name}'.lstrip('.')
  return names


def _trains(section, name):
  """Returns whether a field has an effect on a training with fixed formats."""
  if section == 'search':
    return name in _OF_TRAINING
  return section not in ('reward', 'controller')


def formats_field(formats):
  """Returns given formats as the field `formats` of a config has them."""
  if isinstance(formats, str | os.PathLike):
    return os.fspath(formats)
  given = formats.formats if isinstance(formats, Result) else formats
  given = dict(given) if isinstance(given, Mapping) else given
  return json.dumps(assignments.parse(given, 'formats'))
