"""Formats for trained weights without training, beside uniform models, on the digits.

    python benchmarks/post_training.py [--workdir=DIR] [--seeds=3] [--finish_steps=200]

For each seed a ResNet-18 is trained for 400 steps in float32. At the cost of uniform
int3 and int4: the accuracy of the uniform model with these weights, calibrated as the
search is; that of the formats found without training over {int2, int3, int4, int8};
both with weights rounded by reconstruction; the formats found first after a short
training in them, from the same weights, without which --finish_steps=0 does; and the
seconds of the first search. A workdir that holds some of the runs is continued, whose
seconds are not known then.
"""

import argparse
import contextlib
import importlib.util
import math
import pathlib
import statistics
import tempfile
import time

import jax

from fliqs_jax.runs import loop
from fliqs_jax.runs.result import RESULT_FILE

CONFIG = pathlib.Path(__file__).parents[1] / 'configs' / 'resnet18.py'
TARGETS = ('int3', 'int4')
COLUMNS = (
  'unquantized', 'uniform', 'found', 'uniform rounded', 'found rounded', 'finished',
  'seconds',
)  # fmt: skip


def load_config(seed, **fields):
  """Returns the digits config with some fields, `__` for a dot."""
  spec = importlib.util.spec_from_file_location('resnet18_config', CONFIG)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  config = module.get_config('digits')
  fields = {name.replace('__', '.'): value for name, value in fields.items()}
  config.update_from_flattened_dict({'seed': seed, **fields})
  return config


def run_target(folder, seed, target, finish_steps):
  """Returns the columns of one row."""
  start = folder / f'float-{seed}'
  before = loop.run(
    load_config(seed, mode='train', formats='float32', num_steps=400), start
  )

  def search(name, formats, **fields):
    config = load_config(
      seed, num_steps=0, init_from=str(start), search__strategy='sensitivity',
      search__formats=formats, search__target_format=target,
      search__statistics_batches=20, **fields,
    )  # fmt: skip
    path = folder / f'{name}-{target}-{seed}'
    was_there, started = (path / RESULT_FILE).exists(), time.monotonic()
    result = loop.run(config, path)
    return path, result, math.nan if was_there else time.monotonic() - started

  # At the cost of the cheapest of the formats there is one assignment.
  _, uniform, _ = search('uniform', f'{target},int8')
  path, found, seconds = search('found', 'int2,int3,int4,int8')
  reconstruction = {
    'search__rounding': 'reconstruction',
    'quantizer__calibration': 'rms_absmax',
  }
  _, uniform_rounded, _ = search('uniform-rounded', f'{target},int8', **reconstruction)
  _, rounded, _ = search('rounded', 'int2,int3,int4,int8', **reconstruction)
  finished = math.nan
  if finish_steps:
    config = load_config(
      seed, mode='train', formats=str(path / RESULT_FILE), init_from=str(start),
      num_steps=finish_steps, optimizer__learning_rate=0.02, search__weight_delay=0,
      search__activation_delay=0,
    )  # fmt: skip
    run = loop.run(config, folder / f'finished-{target}-{seed}')
    finished = run['eval']['accuracy']
  runs = before, uniform, found, uniform_rounded, rounded
  accuracies = [run['eval']['accuracy'] for run in runs]
  return dict(zip(COLUMNS, (*accuracies, finished, seconds)))


def main():
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--workdir', help='folder for the runs (default: temporary)')
  parser.add_argument('--seeds', type=int, default=3)
  parser.add_argument('--finish_steps', type=int, default=200)
  args = parser.parse_args()

  rows = []
  with contextlib.ExitStack() as stack:
    folder = args.workdir or stack.enter_context(tempfile.TemporaryDirectory())
    folder = pathlib.Path(folder)
    # Every seed runs the same programs.
    jax.config.update('jax_compilation_cache_dir', str(folder / 'compiled'))
    for target in TARGETS:
      of_target = [
        run_target(folder, seed, target, args.finish_steps)
        for seed in range(args.seeds)
      ]
      rows += [(target, seed, row) for seed, row in enumerate(of_target)]
      mean = {name: statistics.mean(row[name] for row in of_target) for name in COLUMNS}
      rows.append((target, 'mean', mean))
  print(f'| at the cost of | seed | {" | ".join(COLUMNS)} |')
  print('|---' * (2 + len(COLUMNS)) + '|')
  for target, seed, row in rows:
    numbers = [_text(row[name], '{:.2%}') for name in COLUMNS[:-1]]
    numbers.append(_text(row['seconds'], '{:.0f}'))
    print(f'| {target} | {seed} | {" | ".join(numbers)} |')


def _text(number, form):
  return '–' if math.isnan(number) else form.format(number)


if __name__ == '__main__':
  main()
