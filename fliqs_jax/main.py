"""Runs a search, training with fixed formats, or an evaluation.

    python -m fliqs_jax.main --config=configs/resnet18.py:digits --workdir=runs/digits

Any field of the config is overridden as --config.search.target_scale=0.5. The same
workdir resumes by itself. --config.search.targets=int3,int4 searches for several
targets, each in a folder of its own in the workdir. Bad input ends with one line for
each problem and status 2; SIGTERM or Ctrl-C with a checkpoint and status 75.
"""

import logging

from absl import flags
import jax

from fliqs_jax import command_line
from fliqs_jax.reporting import terminal
from fliqs_jax.runs import distributed, files, front, loop

_CONFIG = command_line.define_config_flag()
_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder for all files of the run.')
_ALLOW_CONFIG_CHANGE = flags.DEFINE_bool(
  'allow_config_change', False, 'Resume a workdir although its config differs.'
)
_COORDINATOR = flags.DEFINE_string(
  'coordinator', None, 'HOST:PORT of process 0, where there are several processes.'
)
_NUM_PROCESSES = flags.DEFINE_integer('num_processes', None, 'How many there are.')
_PROCESS_ID = flags.DEFINE_integer('process_id', None, 'Of this process, from 0 on.')
_DISTRIBUTED = flags.DEFINE_bool(
  'distributed', False, 'Find the processes of a TPU slice, of GKE or of Slurm.'
)

_logger = logging.getLogger(__name__)


def main(argv):
  """Runs the config in the workdir and prints the result."""
  del argv
  distributed.initialize(
    _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value, _DISTRIBUTED.value
  )
  if front.is_front(_CONFIG.value):
    _run_front()
    return
  result = loop.run(_CONFIG.value, _WORKDIR.value, _ALLOW_CONFIG_CHANGE.value)
  if jax.process_index() == 0:
    terminal.print_result(result, _WORKDIR.value)
    if result['config']['mode'] != 'eval':
      _write_report([_WORKDIR.value])


def _run_front():
  """Searches for all targets of the config and prints their points."""
  from fliqs_jax.reporting import pareto_figure  # imports matplotlib

  folder = files.to_path(_WORKDIR.value)
  points = front.run(
    _CONFIG.value, folder, pareto_figure.write_sweep, _ALLOW_CONFIG_CHANGE.value
  )
  if jax.process_index() == 0:
    terminal.print_points(points, [], _WORKDIR.value)
    workdirs = [str(folder / point['workdir']) for point in points]
    _write_report(workdirs, str(folder / 'report.html'))


def _write_report(workdirs, out=None):
  from fliqs_jax.reporting import page  # imports matplotlib

  try:
    print(f'Report: {page.write_report(workdirs, out)}')
  except Exception as error:  # the run is done, whatever a picture of it may lack
    _logger.warning('No report was written: %s: %s', type(error).__name__, error)


if __name__ == '__main__':
  command_line.run(main, required=('config', 'workdir'))
