"""Checkpoints of Hugging Face: a folder with a `config.json` and safetensors."""

import inspect
from typing import Any

from etils import epath
import ml_collections

from fliqs_jax.errors import ConfigError
from fliqs_jax.models import llama_checkpoint
from fliqs_jax.models.decoder import Decoder
from fliqs_jax.runs import files

_CONFIG, _WEIGHTS = 'config.json', '*.safetensors'


def is_checkpoint(folder: epath.Path) -> bool:
  """Returns whether a path is such a folder."""
  return (folder / _CONFIG).is_file() and any(folder.glob(_WEIGHTS))


def read(folder: epath.Path) -> dict[str, Any]:
  """Returns the parameters of the decoder that a folder holds.

  Raises:
    ConfigError: where its files cannot be read, or are of another network.
  """
  try:
    from safetensors import SafetensorError
    from safetensors.numpy import load
  except ImportError:
    raise ConfigError(
      f'{str(folder)!r} needs safetensors: pip install "fliqs_jax[export]"'
    ) from None
  tensors = {}
  for path in sorted(folder.glob(_WEIGHTS)):
    try:
      tensors |= load(path.read_bytes())
    except (OSError, SafetensorError) as error:
      raise ConfigError(f'{str(path)!r} cannot be read: {error}') from None
  return _named(folder, llama_checkpoint.params, tensors)


def check_sizes(config: ml_collections.ConfigDict) -> None:
  """Checks that a config's network is the one of the folder in `init_from`, if any.

  Raises:
    ConfigError: where it is another one, in one line that names what differs.
  """
  folder = files.to_path(config.init_from) if config.init_from else None
  if folder is None or not is_checkpoint(folder):
    return
  expected = _named(folder, llama_checkpoint.sizes)
  if config.model.name != 'decoder':
    raise ConfigError(
      f'init_from={str(folder)!r}: expected model.name=decoder, found '
      f'{config.model.name!r}'
    )
  defaults = inspect.signature(Decoder.__init__).parameters
  vocabulary = expected.pop('vocabulary_size')
  differing = [
    f'model.{name}={value!r} where it has {size!r}'
    for name, size in expected.items()
    if (value := config.model.get(name, defaults[name].default)) != size
  ]
  if config.num_classes != vocabulary:
    differing.append(f'num_classes={config.num_classes} where it has {vocabulary}')
  if differing:
    raise ConfigError(
      f'init_from={str(folder)!r} is of another network: {", ".join(differing)}'
    )


def _named(folder, function, *arguments):
  """Returns what a function makes of the config; its problems name the folder."""
  content = files.read_json(folder / _CONFIG)
  try:
    return function(content, *arguments)
  except ConfigError as error:
    raise ConfigError(
      f'init_from={str(folder)!r}: {"; ".join(error.problems)}'
    ) from None
