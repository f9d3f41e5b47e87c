"""The cost of a checkpoint every 100 steps of a search on the digits.

    python benchmarks/checkpoint_cost.py [--width=0.25] [--rounds=5]

Stretches of 100 steps that begin with a checkpoint, which is written while they are
taken, and stretches without, in turns; medians. On a CPU the writing takes processor
time from the steps, which it does not where these are an accelerator's; how long the
call itself keeps the loop from its next step is printed as well. A checkpoint costs the
same whatever a step takes, so its share falls with the width of the network.
"""

import argparse
import pathlib
import runpy
import statistics
import tempfile
import time

from etils import epath
import jax

from fliqs_jax.data import pipeline
from fliqs_jax.runs import evaluation, loop
from fliqs_jax.runs import setup as setup_lib
from fliqs_jax.runs.checkpoints import Checkpoints
from fliqs_jax.runs.config import resolve
from fliqs_jax.training import sharding

CONFIG = pathlib.Path(__file__).parents[1] / 'configs' / 'resnet18.py'
_STEPS = 100


def main():
  """Prints the seconds of both kinds of stretches."""
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--width', type=float, default=0.25, help="the network's")
  parser.add_argument('--rounds', type=int, default=5)
  args = parser.parse_args()
  config = runpy.run_path(str(CONFIG))['get_config']('digits')
  config.model.width = args.width
  config = resolve(config)
  setup = setup_lib.build(config, jax.device_count())
  builder = pipeline.find_builder(config)
  pipeline.prepare(config, builder)
  mesh = sharding.make_mesh(config.search.num_samples)
  state = evaluation.initial_state(setup, mesh, config.seed)
  step_fn = loop.make_step(setup, mesh)
  batch_sharding = sharding.batch_sharding(mesh)
  batches = pipeline.train_batches(config, builder, config.seed, batch_sharding)

  def stretch(state, checkpoints=None):
    began = time.perf_counter()
    if checkpoints:
      checkpoints.save(state, batches)
      calls.append(time.perf_counter() - began)
    for _ in range(_STEPS):
      batch = jax.make_array_from_process_local_data(batch_sharding, next(batches))
      state, _ = step_fn(state, batch)
    jax.block_until_ready(state)
    return state, time.perf_counter() - began

  seconds, calls = {'without': [], 'with a checkpoint': []}, []
  with (
    tempfile.TemporaryDirectory() as folder,
    Checkpoints(epath.Path(folder)) as checkpoints,
  ):
    state, _ = stretch(state, checkpoints)  # compiles
    for _ in range(args.rounds):
      for name, used in (('without', None), ('with a checkpoint', checkpoints)):
        state, taken = stretch(state, used)
        seconds[name].append(taken)
  medians = {name: statistics.median(times) for name, times in seconds.items()}
  for name, median in medians.items():
    print(f'{_STEPS} steps {name}: {median:.3f} s, {median / medians["without"]:.4f}')
  print(f'the call to save: {statistics.median(calls):.3f} s')


if __name__ == '__main__':
  main()
