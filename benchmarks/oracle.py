"""Every assignment of a small space, trained: what strategies find beside the best.

    python benchmarks/oracle.py --folder=DIR --enumerate [--seeds 0 1]
    python benchmarks/oracle.py --folder=DIR [--strategies actor_critic ...]

The space has six decisions among int2, int3 and int4: the query and key, the value and
out, and the perceptron of each of two blocks of a language model of width 32, whose
head stays in int3. All assignments within int3's cost start from the same weights,
those of the steps before the commitment, and take the other steps under their own
formats. `--enumerate` trains what is missing in `oracle.json`, ten minutes of a core
for each seed; the file beside this script is from the seeds 0 and 1.

The second command runs each strategy from seeds of its own, and looks up what it found:
its regret is the mean bits per byte of that assignment above those of the best one. It
prints Spearman's rank correlations with the trained bits per byte too: of the
supernet's own ones, measured at the commitment with all evaluation examples, and of the
other seed's, which bounds what any strategy can know.
"""

import argparse
import importlib.util
import itertools
import json
import pathlib

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from fliqs_jax.runs import evaluation, loop, preparation
from fliqs_jax.runs.checkpoints import Checkpoints
from fliqs_jax.runs.config import resolve
from fliqs_jax.search.budget import fits
from fliqs_jax.search.strategies import STRATEGIES
from fliqs_jax.training import sharding

HERE = pathlib.Path(__file__).parent
ORACLE = HERE / 'oracle.json'
GROUPS = (
  r'(block\d)/attention/(?:query|key)',
  r'(block\d)/attention/(?:value|out)',
  r'(block\d)/(?:up|down)',
)


def load_config(seed, strategy='actor_critic'):
  """Returns the config of a search in the small space."""
  path = HERE.parent / 'configs' / 'transformer_lm.py'
  spec = importlib.util.spec_from_file_location('transformer_lm_config', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  config = module.get_config('stdlib')
  config.update(seed=seed, num_steps=400, log_every=100, batch_size=16)
  config.input.context = 32
  config.model.update(hidden_size=32, depth=2, num_heads=2)
  config.search.update(
    strategy=strategy,
    formats='int2,int3,int4',
    groups=GROUPS,
    pins=(('head', 'int3'),),
  )
  if strategy == 'exhaustive':  # which measures each assignment once at least
    config.search.policy_delay = 20
  return config


def enumerate_all(seed, folder):
  """Trains every assignment within the budget that `oracle.json` lacks."""
  config = resolve(load_config(seed))
  setup = preparation.prepare(config, folder)
  loop.train_to_commitment(setup, folder)
  mesh = sharding.make_mesh(setup.num_samples)
  step, evaluate = loop.make_step(setup, mesh), evaluation.make_evaluate(setup, mesh)
  state, batches = _restore(setup, mesh, folder)
  left = config.num_steps - setup.commit_step
  batches = [
    jax.device_put(batch, sharding.batch_sharding(mesh))
    for batch in itertools.islice(batches, left)
  ]
  content = json.loads(ORACLE.read_text()) if ORACLE.exists() else {}
  found = content.setdefault(str(seed), {})
  for choices in assignments(setup):
    name = ','.join(
      d.options[choice] for d, choice in zip(setup.space.decisions, choices)
    )
    if name in found:
      continue
    own = evaluate(state.replace(params=state.averaged_params), choices)
    trained = jax.tree.map(jnp.copy, state)
    committed = setup.controller.commit(trained.controller, jnp.asarray(choices))
    trained = trained.replace(controller=committed)
    for batch in batches:
      trained, _ = step(trained, batch)
    found[name] = {
      'cost_ratio': float(setup.cost_model(setup.space, choices)) / setup.target,
      'supernet': own['bits_per_byte'],
      'trained': evaluate(trained, choices)['bits_per_byte'],
    }
    if len(found) % 10 == 0:
      ORACLE.write_text(json.dumps(content, indent=1) + '\n')
      print(f'seed {seed}: {len(found)} assignments', flush=True)
  ORACLE.write_text(json.dumps(content, indent=1) + '\n')


def _restore(setup, mesh, folder):
  state = evaluation.initial_state(setup, mesh, setup.config.seed)
  batches = setup.data.train(setup.config.seed, sharding.batch_sharding(mesh))
  with Checkpoints(folder) as checkpoints:
    return checkpoints.restore(state, batches), batches


def assignments(setup):
  """Yields the choices int32[N] that are within the budget."""
  sizes = [len(decision.options) for decision in setup.space.decisions]
  for choices in itertools.product(*map(range, sizes)):
    choices = np.array(choices, np.int32)
    if fits(setup.space, choices, [setup.problem.target]):
      yield choices


def run_strategies(strategies, seeds, folder):
  """Runs strategies and prints a table of their regrets."""
  content = json.loads(ORACLE.read_text())
  names = sorted(set.intersection(*map(set, content.values())))
  trained = {
    name: np.mean([found[name]['trained'] for found in content.values()])
    for name in names
  }
  best, median = min(trained.values()), np.median([*trained.values()])
  print(f'{len(names)} assignments, {len(content)} seeds; best {best:.4f}')
  print_correlations(content, names)
  print(
    '| strategy | regret, bits per byte | of uniform | one-shot |\n|---|---|---|---|'
  )
  uniform = trained[','.join(['int3'] * 6)] - best
  regret = median - best
  print(f'| the median assignment | {regret:.4f} | {regret / uniform:.2f} | |')
  for strategy in strategies:
    regrets, own = [], []
    for seed in seeds:
      config = load_config(seed, strategy)
      result = loop.run(config, folder / f'{strategy}-{seed}')
      decided = {
        layer['decisions']['weights']: result['formats'][path]['weights']
        for path, layer in result['layers'].items()
        if layer['decisions']['weights']
      }
      name = ','.join(decided[decision] for decision in result['policy'])
      regrets.append(trained[name] - best)
      own.append(result['eval']['bits_per_byte'])
    error = np.std(regrets, ddof=1) / len(seeds) ** 0.5
    print(
      f'| {strategy} | {np.mean(regrets):.4f} ± {error:.4f} '
      f'| {np.mean(regrets) / uniform:.2f} | {np.mean(own):.4f} |',
      flush=True,
    )


def print_correlations(content, names):
  """Prints Spearman's rank correlations with the trained bits per byte."""
  column = lambda seed, key: [content[seed][name][key] for name in names]
  for seed in content:
    own = stats.spearmanr(column(seed, 'supernet'), column(seed, 'trained'))
    print(f'seed {seed}: rank correlation of the supernet {own.statistic:.3f}')
  for one, other in itertools.combinations(content, 2):
    seeds = stats.spearmanr(column(one, 'trained'), column(other, 'trained'))
    print(f'seeds {one} and {other}: rank correlation {seeds.statistic:.3f}')


def main():
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--folder', required=True, help='folder of all runs')
  parser.add_argument('--enumerate', action='store_true')
  parser.add_argument('--seeds', type=int, nargs='+')
  parser.add_argument(
    '--strategies', nargs='+', default=tuple(STRATEGIES), choices=STRATEGIES
  )
  args = parser.parse_args()
  folder = epath.Path(args.folder)
  jax.config.update('jax_compilation_cache_dir', str(folder / 'compiled'))
  if args.enumerate:
    for seed in args.seeds or [0, 1]:
      enumerate_all(seed, folder / f'shared-{seed}')
  else:
    run_strategies(args.strategies, args.seeds or range(10, 20), folder)


if __name__ == '__main__':
  main()
