r"""Makes the figures of the paper's analysis for a config's network.

    python -m fliqs_jax.analysis --config=configs/resnet18.py:digits \
      --folder=runs/analysis --figure=switching

switching: the error of the weights between every two formats. clipping: errors against
clipping thresholds, and the best ones (Figure 4a). entropy: four searches with other
entropy weights (Figure 4b). formats: bits against depth and kind of layers (Figure 3),
of the searches in --workdir, or of those that entropy made. Each leaves a PNG and its
numbers as JSON in the folder.
"""

from absl import flags

from fliqs_jax import command_line
from fliqs_jax.reporting import analysis

_CONFIG = command_line.define_config_flag()
_FOLDER = flags.DEFINE_string('folder', None, 'Folder for figures, numbers and runs.')
_FIGURE = flags.DEFINE_enum('figure', 'all', ('all', *analysis.FIGURES), 'Which one.')
_WORKDIR = flags.DEFINE_multi_string(
  'workdir', [], 'Finished runs: weights of the first, formats of all.'
)


def main(argv):
  """Makes the figures that --figure names."""
  del argv
  names = analysis.FIGURES if _FIGURE.value == 'all' else (_FIGURE.value,)
  for name, path in analysis.write_figures(
    _CONFIG.value, _FOLDER.value, names, _WORKDIR.value
  ):
    print(f'{name}: {path}', flush=True)


if __name__ == '__main__':
  command_line.run(main, required=('config', 'folder'))
