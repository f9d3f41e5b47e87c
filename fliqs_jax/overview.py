"""Prints a network's layers, their MACs, parameters and costs, without training it.

    python -m fliqs_jax.overview --config=configs/resnet18.py --format=e4m3

The costs are those of the network with every layer in that format, or in the formats
of --config.formats. --device=NAME lists the formats that a device multiplies natively,
with their rates. --json prints one JSON object instead of the table.
"""

import json

from absl import flags

from fliqs_jax import command_line
from fliqs_jax.errors import ConfigError
from fliqs_jax.reporting import overview
from fliqs_jax.runs import files, supernet
from fliqs_jax.runs.config import resolve

_CONFIG = command_line.define_config_flag()
_FORMAT = flags.DEFINE_string('format', None, 'Format of all layers (default: bf16).')
_DEVICE = flags.DEFINE_string('device', None, 'Device whose formats are listed.')
_JSON = flags.DEFINE_bool('json', False, 'Print one JSON object.')


def main(argv):
  """Prints the overview of the config's network."""
  del argv
  config = resolve(_CONFIG.value)
  if _FORMAT.value and config.formats:
    raise ConfigError('--format and --config.formats: expected one of the two')
  label = _FORMAT.value or config.formats or 'bf16'
  found = overview.describe(
    config,
    files.read_formats(label),
    label,
    supernet.read_architecture(config),
    device=_DEVICE.value,
  )
  print(json.dumps(found.to_json()) if _JSON.value else found)


if __name__ == '__main__':
  command_line.run(main, required=('config',))
