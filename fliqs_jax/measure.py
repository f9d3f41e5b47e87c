"""Times a network's layers on the device at hand, in each format that is searched.

    python -m fliqs_jax.measure --config=configs/resnet18.py:digits --out=latency.json

writes the file that the cost model `latency_table` reads. Where the device multiplies a
format itself, a layer's operands are given in that type; otherwise the operator that
emulates the format is timed. The file says which. With --workdir=DIR --end_to_end the
exported network of a finished run is timed beside uniform models, for its report.
"""

from absl import flags

from fliqs_jax import command_line
from fliqs_jax.errors import ConfigError

_CONFIG = command_line.define_config_flag()
_OUT = flags.DEFINE_string('out', None, 'The file to write.')
_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of a finished run.')
_END_TO_END = flags.DEFINE_bool('end_to_end', False, 'Time the whole network.')
_TO = flags.DEFINE_list('to', 'stablehlo', 'Exports to time, of stablehlo, onnx.')
_BATCH_SIZE = flags.DEFINE_multi_integer(
  'batch_size', 8, 'Examples at a time; repeatable with --end_to_end.', 1
)
_REPEATS = flags.DEFINE_integer('repeats', 20, 'Times of which the median counts.', 1)


def main(argv):
  """Measures the layers of the config's network, or the network of a finished run."""
  del argv
  if _END_TO_END.value:
    _check('--end_to_end', needed=[_WORKDIR], others=[_CONFIG, _OUT])
    _measure_network()
  else:
    _check('the layers of a config', needed=[_CONFIG, _OUT], others=[_WORKDIR])
    _measure_layers()


def _check(what, needed, others):
  for flag in needed:
    if flag.value is None:
      name = flag.name
      raise ConfigError(f'--{name} is missing: expected --{name}={name.upper()}')
  for flag in others:
    if flag.value is not None:
      expected = ' and '.join(f'--{other.name}' for other in needed)
      raise ConfigError(f'--{flag.name} has no use for {what}: expected {expected}')


def _measure_network():
  # After the flags, whose errors need no network.
  from fliqs_jax.exporting import speed
  from fliqs_jax.reporting import terminal
  from fliqs_jax.runs import files

  folder = files.to_path(_WORKDIR.value)
  measured = speed.measure_run(folder, _TO.value, _BATCH_SIZE.value, _REPEATS.value)
  terminal.print_speed(measured, str(folder))


def _measure_layers():
  if len(_BATCH_SIZE.value) > 1:
    raise ConfigError(
      f'--batch_size={_BATCH_SIZE.value}: expected one, or --end_to_end for several'
    )
  from fliqs_jax.runs import latency_measurement

  measured = latency_measurement.write_latencies(
    _CONFIG.value, _OUT.value, *_BATCH_SIZE.value, _REPEATS.value
  )
  print(f'{latency_measurement.summary(measured)}: {_OUT.value}')


if __name__ == '__main__':
  command_line.run(main, required=())
