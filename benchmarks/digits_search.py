"""One-shot accuracy on the digits, beside the uniform model and retraining.

    python benchmarks/digits_search.py [--workdir=DIR] [--seeds=5] [--json]

Over {int2, int3, int4, int8} at the cost of the uniform int3 model, for each seed: the
search's one-shot accuracy, the uniform int3 model's, and that of the found formats
trained again from random weights for as many steps. A workdir that holds some of the
runs is continued. Takes about twenty minutes on two cores.
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
from fliqs_jax.runs.result import RESULT_FILE

CONFIG = pathlib.Path(__file__).parents[1] / 'configs' / 'resnet18.py'
UNIFORM = 'int3'


def load_config(seed, mode='search', formats=''):
  """Returns the digits config for a run."""
  spec = importlib.util.spec_from_file_location('resnet18_config', CONFIG)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  config = module.get_config('digits')
  config.seed, config.mode, config.formats = seed, mode, str(formats)
  return config


def run_seed(folder, seed):
  """Returns the results of the search, the uniform model and the retraining."""
  search = loop.run(load_config(seed), folder / f'search-{seed}')
  found = folder / f'search-{seed}' / RESULT_FILE
  uniform = loop.run(load_config(seed, 'train', UNIFORM), folder / f'uniform-{seed}')
  again = loop.run(load_config(seed, 'train', found), folder / f'retrained-{seed}')
  return {
    'seed': seed,
    'one_shot': search['eval']['accuracy'],
    'uniform': uniform['eval']['accuracy'],
    'retrained': again['eval']['accuracy'],
    'cost_ratio': search['cost'] / search['target'],
  }


def main():
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--workdir', help='folder for the runs (default: temporary)')
  parser.add_argument('--seeds', type=int, default=5)
  parser.add_argument('--json', action='store_true', help='print one JSON object')
  args = parser.parse_args()

  with contextlib.ExitStack() as stack:
    folder = args.workdir or stack.enter_context(tempfile.TemporaryDirectory())
    folder = pathlib.Path(folder)
    # Every seed runs the same programs.
    jax.config.update('jax_compilation_cache_dir', str(folder / 'compiled'))
    rows = [run_seed(folder, seed) for seed in range(args.seeds)]
  mean = {key: statistics.mean(row[key] for row in rows) for key in rows[0]}
  if args.json:
    print(json.dumps({'seeds': rows, 'mean': mean}))
    return
  print('| seed | one-shot | uniform int3 | retrained | cost / target |')
  print('|---|---|---|---|---|')
  for row in [*rows, {**mean, 'seed': 'mean'}]:
    print(
      f'| {row["seed"]} | {row["one_shot"]:.2%} | {row["uniform"]:.2%} '
      f'| {row["retrained"]:.2%} | {row["cost_ratio"]:.4f} |'
    )


if __name__ == '__main__':
  main()
