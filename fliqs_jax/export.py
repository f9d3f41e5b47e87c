"""Exports the network of a finished search, loads it again, and compares the outputs.

    python -m fliqs_jax.export --workdir=runs/digits --to=stablehlo

writes a folder, runs/digits/export/stablehlo or --out/stablehlo, with the file, a
program that loads it without this package, and report.json. docs/deploy.md goes on from
there.
"""

import os

from absl import flags

from fliqs_jax import command_line

_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of a finished run.')
_TO = flags.DEFINE_list('to', None, 'Of safetensors, stablehlo, onnx, qwix.')
_FOLD = flags.DEFINE_bool(
  'fold_batch_norm', False, 'Fold batch normalisation into the layers before it.'
)
_OUT = flags.DEFINE_string('out', None, 'Folder of exports; WORKDIR/export by default.')


def main(argv):
  """Exports the run in the workdir and prints how it compares."""
  del argv
  # After the flags, whose errors need no network.
  from fliqs_jax.exporting import deployment, exporter
  from fliqs_jax.runs import evaluation, files

  out = _OUT.value or os.path.join(_WORKDIR.value, 'export')
  folders = {target: os.path.join(out, target) for target in _TO.value}
  for target, folder in folders.items():
    exporter.check(target, folder, _FOLD.value)
  run = evaluation.finished_run(files.to_path(_WORKDIR.value))
  deployed = deployment.make_deployment(*run)
  deployed = deployed._replace(folds_batch_norm=_FOLD.value)
  for target, folder in folders.items():
    print(exporter.summary(exporter.export(deployed, target, folder), folder))


if __name__ == '__main__':
  command_line.run(main, required=('workdir', 'to'))
