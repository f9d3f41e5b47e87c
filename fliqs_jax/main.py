"""Runs a search, training with fixed formats, or an evaluation.

    python -m fliqs_jax.main --config=configs/resnet18.py:digits --workdir=runs/digits

Any field of the config is overridden as --config.search.target_scale=0.5. The same
workdir resumes by itself. Bad input ends with one line for each problem and status 2.
"""

import logging

from absl import flags
import jax

from fliqs_jax import command_line, display

_CONFIG = command_line.define_config_flag()
_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder for all files of the run.')
_ALLOW_CONFIG_CHANGE = flags.DEFINE_bool(
  'allow_config_change', False, 'Resume a workdir although its config differs.'
)

_logger = logging.getLogger(__name__)


def main(argv):
  """Runs the config in the workdir and prints the result."""
  del argv
  from fliqs_jax import train  # after the flags, whose errors need no TensorFlow

  result = train.run(_CONFIG.value, _WORKDIR.value, _ALLOW_CONFIG_CHANGE.value)
  display.print_result(result, _WORKDIR.value)
  if result['config']['mode'] != 'eval' and jax.process_index() == 0:
    _write_report()


def _write_report():
  from fliqs_jax import report_page  # imports TensorFlow too

  try:
    print(f'Report: {report_page.write([_WORKDIR.value])}')
  except Exception as error:  # the run is done, whatever a picture of it may lack
    _logger.warning('No report was written: %s: %s', type(error).__name__, error)


if __name__ == '__main__':
  command_line.run(main, required=('config', 'workdir'))
