"""What a checkpoint every 100 steps costs a search on the digits.

    python benchmarks/checkpoint_cost.py

Stretches of 100 steps that begin with a checkpoint, which is written while they are
taken, and stretches without, in turns; medians.
"""

import pathlib
import runpy
import statistics
import tempfile
import time

from etils import epath
import jax

from fliqs_jax import assembly, evaluation, input_pipeline, meshes, train
from fliqs_jax.checkpoints import Checkpoints
from fliqs_jax.config import resolve

CONFIG = pathlib.Path(__file__).parents[1] / 'configs' / 'resnet18.py'
_STEPS, _ROUNDS = 100, 9


def main():
  """Prints the seconds of both kinds of stretches."""
  config = resolve(runpy.run_path(str(CONFIG))['get_config']('digits'))
  setup = assembly.build(config, jax.device_count())
  builder = input_pipeline.find_builder(config)
  input_pipeline.prepare(config, builder)
  mesh = meshes.make_mesh(config.search.num_samples)
  state = evaluation.initial_state(setup, mesh, config.seed)
  step_fn = train._make_step(config, setup, mesh)
  sharding = meshes.batch_sharding(mesh)
  batches = input_pipeline.train_batches(config, builder, config.seed, sharding)

  def stretch(state, checkpoints=None):
    began = time.perf_counter()
    if checkpoints:
      checkpoints.save(state, batches)
    for _ in range(_STEPS):
      batch = jax.make_array_from_process_local_data(sharding, next(batches))
      state, _ = step_fn(state, batch)
    jax.block_until_ready(state)
    return state, time.perf_counter() - began

  seconds = {'without': [], 'with a checkpoint': []}
  with (
    tempfile.TemporaryDirectory() as folder,
    Checkpoints(epath.Path(folder)) as checkpoints,
  ):
    state, _ = stretch(state, checkpoints)  # compiles
    for _ in range(_ROUNDS):
      for name, used in (('without', None), ('with a checkpoint', checkpoints)):
        state, taken = stretch(state, used)
        seconds[name].append(taken)
  medians = {name: statistics.median(times) for name, times in seconds.items()}
  for name, median in medians.items():
    print(f'{_STEPS} steps {name}: {median:.3f} s, {median / medians["without"]:.4f}')


if __name__ == '__main__':
  main()
