"""Strategies of search beside fixed formats, on a language model of bytes.

    python benchmarks/search_quality.py --folder=DIR [--seeds 10 11 12 13 14]
      [--budgets int3 0.75*int4] [--methods one_shot uniform ...] [--num_steps=1000]
    python benchmarks/search_quality.py --folder=DIR --table
    python benchmarks/search_quality.py --folder=DIR --quick

The network and the text are those of `configs/transformer_lm.py:stdlib`; lower bits per
byte are better. The methods, each with as many training steps:

one_shot         the default strategy's own weights
uniform          the uniform int3 model, the widest within both budgets
retrained        the formats of `one_shot`, trained again from random weights
sensitivity      formats measured on weights that trained unquantized to 95 % of a run
                 (strategy `sensitivity`), trained again: two runs
policy_gradient  FLIQS's REINFORCE, its own weights
random           the best of eight random assignments by the shared weights, one run
front            the default strategy for all budgets at once, with one supernet, whose
                 seconds are those of the whole front

Every run has its workdir in the folder: the same command goes on where it stopped, and
several processes may work on different seeds. `--table` prints what is there, as mean
and standard error, paired differences to `one_shot` with the p-value of a t-test, and
the median of the seconds that a run took, and draws the points into `points.png`. A run
takes 80 s of one core; `--quick` is two seeds of three methods and 500 steps.
"""

import argparse
import importlib.util
import json
import pathlib
import shutil
import time

import jax
import matplotlib.pyplot as plt
import numpy as np
from scipy import stats

from fliqs_jax.runs import front, loop, targets
from fliqs_jax.runs.result import RESULT_FILE

CONFIG = pathlib.Path(__file__).parents[1] / 'configs' / 'transformer_lm.py'
UNIFORM = 'int3'
BUDGETS = ('int3', '0.75*int4')
SECONDS_FILE = 'seconds.txt'  # of a run, in its workdir
# Whatever is to be compared comes first.
METHODS = (
  'one_shot',
  'uniform',
  'retrained',
  'sensitivity',
  'policy_gradient',
  'random',
  'front',
)


def load_config(seed, budget, num_steps):
  """Returns the config of the default search within a budget, as `0.75*int4`."""
  spec = importlib.util.spec_from_file_location('transformer_lm_config', CONFIG)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  config = module.get_config('stdlib')
  config.seed, config.num_steps, config.log_every = seed, num_steps, 100
  scale, _, config.search.target_format = budget.rpartition('*')
  config.search.target_scale = float(scale or 1)
  return config


def train(config, folder, formats):
  """Returns the result of training fixed formats, a name or a file's."""
  config.mode, config.formats = 'train', str(formats)
  return loop.run(config, folder)


def run(method, config, folder):
  """Returns the result of a method; its runs are in the folder."""
  if method == 'uniform':
    return train(config, folder, UNIFORM)
  if method == 'retrained':
    return train(config, folder, folder.parent / 'one_shot' / RESULT_FILE)
  if method == 'sensitivity':
    found = config.copy_and_resolve_references()
    steps = config.num_steps
    found.search.update(strategy='sensitivity', commit_step=int(0.95 * steps))
    found.search.policy_delay = int(0.82 * steps)
    found.search.update(weight_delay=int(0.95 * steps))
    found.search.update(activation_delay=int(0.95 * steps))
    loop.run(found, folder.with_name('measured'))
    return train(config, folder, folder.with_name('measured') / RESULT_FILE)
  if method == 'front':
    return run_front(config, folder)
  if method != 'one_shot':
    config.search.strategy = method
  return loop.run(config, folder)


def run_front(config, folder):
  """Returns the result at one budget of a search for all of them."""
  own = targets.describe(config.search)
  config.search.targets = BUDGETS
  whole = folder.parents[1] / f'front-{config.seed}'
  front.run(config, whole, draw=lambda folder, points: None)
  (name,) = [
    name
    for name, run in front.plan(config).items()
    if targets.describe(run.search) == own
  ]
  folder.mkdir(parents=True, exist_ok=True)
  shutil.copy(whole / name / RESULT_FILE, folder)
  return json.loads((folder / RESULT_FILE).read_text())


def run_all(args, folder):
  """Runs what is missing, and prints a line for each run."""
  for method in args.methods:
    for budget in args.budgets:
      for seed in args.seeds:
        name = budget.replace('*', 'x')
        workdir = folder / f'{name}-{seed}' / method
        began = time.monotonic()
        result = run(method, load_config(seed, budget, args.num_steps), workdir)
        seconds, taken = round(time.monotonic() - began, 1), workdir / SECONDS_FILE
        if not taken.exists():
          taken.write_text(f'{seconds}\n')
        line = {
          'method': method,
          'budget': budget,
          'seed': seed,
          'bits_per_byte': result['eval']['bits_per_byte'],
          'cost': result['cost'],
          'seconds': seconds,
        }
        print(json.dumps(line), flush=True)


def read_results(folder, methods):
  """Returns `{(method, budget): {seed: result}}` of the finished runs."""
  found = {}
  for path in sorted(folder.glob(f'*/*/{RESULT_FILE}')):
    budget, _, seed = path.parents[1].name.rpartition('-')
    if path.parent.name in methods:
      key = path.parent.name, budget.replace('x', '*')
      result = json.loads(path.read_text())
      seconds = path.with_name(SECONDS_FILE)
      result['seconds'] = float(seconds.read_text()) if seconds.exists() else np.nan
      found.setdefault(key, {})[int(seed)] = result
  return found


def print_table(results, methods):
  """Prints mean and standard error of each method, and differences to `one_shot`."""
  columns = 'budget', 'method', 'bits per byte', 'less one-shot', 'p', 'cost / target'
  columns = (*columns, 'seconds', 'seeds')
  print(f'| {" | ".join(columns)} |\n{"|---" * len(columns)}|')
  for budget in dict.fromkeys(budget for _, budget in results):
    ours = results.get(('one_shot', budget), {})
    target = next((r['target'] for r in ours.values()), None)
    for method in methods:
      runs = results.get((method, budget), {})
      if not runs:
        continue
      values = {seed: r['eval']['bits_per_byte'] for seed, r in runs.items()}
      pairs = [s for s in values if s in ours]
      theirs = [values[s] for s in pairs]
      own = [ours[s]['eval']['bits_per_byte'] for s in pairs]
      difference, p = '', ''
      if method != 'one_shot' and len(pairs) > 1:
        difference = _mean_and_error(np.subtract(theirs, own))
        p = f'{stats.ttest_rel(theirs, own).pvalue:.2g}'
      ratios = [r['cost'] / target for r in runs.values()] if target else []
      cost = f'{np.mean(ratios):.4f}' if ratios else ''
      print(
        f'| {budget} | {method} | {_mean_and_error(list(values.values()))} '
        f'| {difference} | {p} | {cost} | {_median_seconds(runs)} | {len(values)} |'
      )


def _median_seconds(runs):
  return f'{np.nanmedian([r["seconds"] for r in runs.values()]):.0f}'


def draw(results, methods, path):
  """Draws the bits per byte of each run, a panel for each budget."""
  budgets = list(dict.fromkeys(budget for _, budget in results))
  figure, axes = plt.subplots(1, len(budgets), sharey=True, squeeze=False)
  for axis, budget in zip(axes[0], budgets):
    shown = [method for method in methods if (method, budget) in results]
    for place, method in enumerate(shown):
      runs = results[method, budget]
      values = [r['eval']['bits_per_byte'] for r in runs.values()]
      axis.plot([place] * len(values), values, 'o', alpha=0.6)
      axis.plot(place, np.mean(values), 'k_', markersize=20)
    axis.set_xticks(range(len(shown)), shown, rotation=45, ha='right')
    axis.set_title(f'at the cost of {budget}')
  axes[0][0].set_ylabel('bits per byte (lower is better)')
  figure.savefig(path, bbox_inches='tight', dpi=150)


def _mean_and_error(values):
  error = np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else np.nan
  return f'{np.mean(values):.4f} ± {error:.4f}'


def main():
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--folder', required=True, help='folder of all runs')
  parser.add_argument('--seeds', type=int, nargs='+', default=[10, 11, 12, 13, 14])
  parser.add_argument('--budgets', nargs='+', default=BUDGETS)
  parser.add_argument('--methods', nargs='+', default=METHODS, choices=METHODS)
  parser.add_argument('--num_steps', type=int, default=1000)
  parser.add_argument('--table', action='store_true', help='print what there is')
  parser.add_argument('--quick', action='store_true', help='ten minutes of two cores')
  args = parser.parse_args()
  if args.quick:
    args.seeds, args.budgets, args.num_steps = [10, 11], ['int3'], 500
    args.methods = ['one_shot', 'uniform', 'retrained']

  folder = pathlib.Path(args.folder)
  if not args.table:
    jax.config.update('jax_compilation_cache_dir', str(folder / 'compiled'))
    run_all(args, folder)
  results = read_results(folder, args.methods)
  print_table(results, args.methods)
  draw(results, args.methods, folder / 'points.png')


if __name__ == '__main__':
  main()
