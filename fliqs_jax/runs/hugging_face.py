"""Checkpoints of Hugging Face: a folder with a `config.json` and safetensors."""

import inspect
from typing import Any

from etils import epath
import ml_collections

from fliqs_jax.errors import ConfigError
from fliqs_jax.models import bert_checkpoint, llama_checkpoint
from fliqs_jax.models.decoder import Decoder
from fliqs_jax.models.encoder import Encoder
from fliqs_jax.runs import files

_CONFIG, _WEIGHTS = 'config.json', '*.safetensors'


def is_checkpoint(folder: epath.Path) -> bool:
  """Returns whether a path is such a folder."""
  return (folder / _CONFIG).is_file() and any(folder.glob(_WEIGHTS))


def read(folder: epath.Path) -> dict[str, Any]:
  """Returns the parameters of the network that a folder holds.

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
  return _named(folder, 'params', tensors)


def check_sizes(config: ml_collections.ConfigDict) -> bool:
  """Returns True where a config's network is that of the folder in `init_from`, if any.

  Raises:
    ConfigError: where it is another one, in one line that names what differs.
  """
  folder = files.to_path(config.init_from) if config.init_from else None
  if folder is None or not is_checkpoint(folder):
    return True
  expected = _named(folder, 'sizes')
  name, network = _network(files.read_json(folder / _CONFIG))
  if config.model.name != name:
    raise ConfigError(
      f'init_from={str(folder)!r}: expected model.name={name}, found '
      f'{config.model.name!r}'
    )
  defaults = inspect.signature(network.__init__).parameters
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
  return True


def _family(content):
  return bert_checkpoint if content.get('model_type') == 'bert' else llama_checkpoint


def _network(content):
  """Returns the name of the network of a checkpoint, and what has its sizes."""
  if _family(content) is bert_checkpoint:
    return 'encoder', Encoder
  return 'decoder', Decoder


def _named(folder, function, *arguments):
  """Returns what a function of the family's module makes of the config.

  Its problems name the folder.
  """
  content = files.read_json(folder / _CONFIG)
  try:
    return getattr(_family(content), function)(content, *arguments)
  except ConfigError as error:
    raise ConfigError(
      f'init_from={str(folder)!r}: {"; ".join(error.problems)}'
    ) from None
