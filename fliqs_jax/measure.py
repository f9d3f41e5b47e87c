"""Times a network's layers on the device at hand, in each format that is searched.

    python -m fliqs_jax.measure --config=configs/resnet18.py:digits --out=latency.json

writes the file that the cost model `latency_table` reads. Where the device multiplies a
format itself, a layer's operands are given in that type; otherwise the operator that
emulates the format is timed. The file says which.
"""

from absl import flags

from fliqs_jax import command_line
from fliqs_jax.runs import latency_measurement

_CONFIG = command_line.define_config_flag()
_OUT = flags.DEFINE_string('out', None, 'The file to write.')
_BATCH_SIZE = flags.DEFINE_integer('batch_size', 8, 'Examples at a time.', 1)
_REPEATS = flags.DEFINE_integer('repeats', 20, 'Times of which the median counts.', 1)


def main(argv):
  """Measures the config's network and writes the table."""
  del argv
  measured = latency_measurement.write_latencies(
    _CONFIG.value, _OUT.value, _BATCH_SIZE.value, _REPEATS.value
  )
  print(f'{latency_measurement.summary(measured)}: {_OUT.value}')


if __name__ == '__main__':
  command_line.run(main, required=('config', 'out'))
