"""Runs a search, training with fixed formats, or an evaluation.

    python -m fliqs_jax.main --config=configs/resnet18.py:digits --workdir=runs/digits

Any field of the config is overridden as --config.search.target_scale=0.5. The same
workdir resumes by itself. Bad input ends with one line for each problem and status 2.
"""

from absl import flags

from fliqs_jax import command_line, display

_CONFIG = command_line.define_config_flag()
_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder for all files of the run.')
_ALLOW_CONFIG_CHANGE = flags.DEFINE_bool(
  'allow_config_change', False, 'Resume a workdir although its config differs.'
)


def main(argv):
  """Runs the config in the workdir and prints the result."""
  del argv
  from fliqs_jax import train  # after the flags, whose errors need no TensorFlow

  result = train.run(_CONFIG.value, _WORKDIR.value, _ALLOW_CONFIG_CHANGE.value)
  display.print_result(result, _WORKDIR.value)


if __name__ == '__main__':
  command_line.run(main, required=('config', 'workdir'))
