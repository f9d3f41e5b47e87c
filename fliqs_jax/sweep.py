r"""Searches for several targets, beside uniform models, and draws their Pareto front.

    python -m fliqs_jax.sweep --config=configs/resnet18.py:digits --targets=int3 \
      --folder=runs/sweep

A target is a format, for the cost of the uniform model in it, SCALE*FORMAT, or a number
in the cost model's unit. At each width there is a search for each target and a uniform
model in each format, with a workdir of its own in the folder. The same command goes on
where it was interrupted; further targets or widths add runs. Bad input ends with
status 2 before the first run; a run that fails does not stop the others: status 1.
"""

import sys

from absl import flags

from fliqs_jax import command_line

_CONFIG = command_line.define_config_flag()
_FOLDER = flags.DEFINE_string('folder', None, 'Folder of all runs of the sweep.')
_TARGETS = flags.DEFINE_list('targets', None, 'FORMAT, SCALE*FORMAT or a number, …')
_WIDTHS = flags.DEFINE_list(
  'widths', [], "Width multipliers; the config's model.width by default."
)


def main(argv):
  """Runs the sweep and prints its points."""
  del argv
  # After the flags, whose errors need no TensorFlow.
  from fliqs_jax.reporting import pareto_figure, terminal
  from fliqs_jax.runs import sweep

  points, failed = sweep.sweep(
    _CONFIG.value,
    _FOLDER.value,
    _TARGETS.value,
    _WIDTHS.value,
    draw=pareto_figure.write_sweep,
  )
  terminal.print_points(points, failed, _FOLDER.value)
  if failed:
    sys.exit(1)


if __name__ == '__main__':
  command_line.run(main, required=('config', 'folder', 'targets'))
