"""Prints a network's layers, their MACs, parameters and costs, without training it.

    python -m fliqs_jax.overview --config=configs/resnet18.py --format=e4m3

The costs are those of the network with every layer in that format, or in the formats
of --config.formats. --device=NAME lists the formats that a device multiplies natively,
with their rates. --json prints one JSON object instead of the table.
"""

from absl import flags

from fliqs_jax import command_line
from fliqs_jax.reporting import overview

_CONFIG = command_line.define_config_flag()
_FORMAT = flags.DEFINE_string('format', None, 'Format of all layers (default: bf16).')
_DEVICE = flags.DEFINE_string('device', None, 'Device whose formats are listed.')
_JSON = flags.DEFINE_bool('json', False, 'Print one JSON object.')


def main(argv):
  """Prints the overview of the config's network."""
  del argv
  overview.print_overview(_CONFIG.value, _FORMAT.value, _DEVICE.value, _JSON.value)


if __name__ == '__main__':
  command_line.run(main, required=('config',))
