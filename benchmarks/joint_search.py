"""Accuracy on the digits: architecture and formats searched together, or either alone.

    python benchmarks/joint_search.py [--workdir=DIR] [--seeds=5] [--json]

Three searches of ResNet-18 at equal cost, for each target and seed: `both`, of widths,
depths and formats; `formats`, of the standard network; `architecture`, of networks in
int8. Targets are multiples of the standard network's cost in int4, which all three
reach. Formats and targets are about those of the ImageNet recipe; the network is half
as wide as that of `configs/resnet18.py:digits`, which is about as good as one can be on
this data in any format. A workdir that holds some of the runs is continued;
`--finished` reports on those alone. Takes about half an hour of one CPU core.
"""

import argparse
import contextlib
import importlib.util
import json
import pathlib
import statistics
import tempfile

import jax

from fliqs_jax.runs import loop
from fliqs_jax.runs.result import RESULT_FILE, read_result

CONFIG = pathlib.Path(__file__).parents[1] / 'configs' / 'resnet18.py'
DECIDE = ('both', 'formats', 'architecture')


def load_config(decide, scale, seed, num_steps, width, formats):
  """Returns the digits config for a run."""
  spec = importlib.util.spec_from_file_location('resnet18_config', CONFIG)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  config = module.get_config('digits')
  config.seed, config.num_steps = seed, num_steps
  config.checkpoint_every = num_steps
  config.model.width, config.model.multipliers = width, (0.5, 0.75, 1.0, 1.5)
  # The one that searches architectures, so that only what is decided differs.
  config.search.strategy = 'policy_gradient'
  config.search.decide = decide
  config.search.formats = 'int8' if decide == 'architecture' else formats
  config.search.target_format, config.search.target_scale = 'int4', scale
  return config


def print_table(rows):
  """Prints the mean and the sample standard deviation over seeds, and the mean cost."""
  print(f'| target / int4 | {" | ".join(DECIDE)} |')
  print('|---|---|---|---|')
  for scale in sorted({row['scale'] for row in rows}):
    cells = []
    for decide in DECIDE:
      own = [row for row in rows if (row['scale'], row['decide']) == (scale, decide)]
      accuracies = [row['accuracy'] for row in own]
      if len(own) < 2:
        cells.append(', '.join(f'{accuracy:.2%}' for accuracy in accuracies))
        continue
      cost_ratio = statistics.mean(row['cost_ratio'] for row in own)
      cells.append(
        f'{statistics.mean(accuracies):.2%} ± {statistics.stdev(accuracies):.2%} '
        f'({len(own)} seeds, {cost_ratio:.3f} of the target)'
      )
    print(f'| {scale} | {" | ".join(cells)} |')


def main():
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--workdir', help='folder for the runs (default: temporary)')
  parser.add_argument('--seeds', type=int, default=5)
  parser.add_argument('--scales', type=float, nargs='+', default=[1.25, 1.5, 2.0])
  parser.add_argument('--num_steps', type=int, default=1_000)
  parser.add_argument('--width', type=float, default=0.0625)
  parser.add_argument('--formats', default='int4,int8')
  parser.add_argument('--finished', action='store_true', help='run nothing')
  parser.add_argument('--json', action='store_true', help='print one JSON object')
  args = parser.parse_args()

  with contextlib.ExitStack() as stack:
    folder = args.workdir or stack.enter_context(tempfile.TemporaryDirectory())
    folder = pathlib.Path(folder)
    # Every seed runs the same programs.
    jax.config.update('jax_compilation_cache_dir', str(folder / 'compiled'))
    rows = []
    for seed in range(args.seeds):
      for scale in args.scales:
        for decide in DECIDE:
          run = folder / f'{decide}-{scale}-{seed}'
          if not args.finished:
            result = loop.run(
              load_config(
                decide, scale, seed, args.num_steps, args.width, args.formats
              ),
              run,
            )
          elif (run / RESULT_FILE).exists():
            result = read_result(run / RESULT_FILE)
          else:
            continue
          rows.append({
              'decide': decide, 'scale': scale, 'seed': seed,
              'accuracy': result['eval']['accuracy'],
              'cost_ratio': result['cost'] / result['target'],
          })  # fmt: skip
          if not args.json:
            print(rows[-1], flush=True)
  if args.json:
    print(json.dumps(rows))
  else:
    print_table(rows)


if __name__ == '__main__':
  main()
