"""Functions that tests call in other processes.

Such a process imports them by the name of their module, so that it must be one that is
found beside `conftest.py`: modules of tests in folders are not.
"""

import atexit
import json
import os
import resource
import time

from etils import epath
from flax import nnx
import jax
import numpy as np

import fliqs_jax
from fliqs_jax.errors import ConfigError
from fliqs_jax.runs import workdir as workdirs
from fliqs_jax.runs.checkpoints import Checkpoints
from fliqs_jax.training import steps


def record_steps(folder):
  """Writes the choices and the weights after every step; in a run's own process."""
  make = steps.make_search_step

  def make_recorded(*args, **kwargs):
    step = make(*args, **kwargs)

    def recorded(state, batch):
      state, metrics = step(state, batch)
      number, choices, params, norm = jax.device_get(
        (state.step, metrics['choices'], state.params, metrics['gradient_norm'])
      )
      if jax.process_index() == 0:
        weights = np.concatenate([a.ravel() for a in jax.tree.leaves(params)])
        np.savez(folder / f'{number}.npz', choices=choices, weights=weights, norm=norm)
      return state, metrics

    return recorded

  steps.make_search_step = make_recorded


def slow_steps():
  """Lets a run last long enough to be stopped."""
  make = steps.make_search_step

  def make_slow(*args, **kwargs):
    step = make(*args, **kwargs)

    def slow(state, batch):
      time.sleep(0.3)
      return step(state, batch)

    return slow

  steps.make_search_step = make_slow


def fill_the_disk():
  """Lets no file grow further from the third checkpoint on."""
  save, saved = Checkpoints.save, []

  def save_or_fail(self, *args):
    saved.append(args)
    if len(saved) == 3:
      limit = 2_048  # bytes: enough for the log, and nothing else
      resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    save(self, *args)

  Checkpoints.save = save_or_fail


def report_cache_hits():
  """Prints a line for each compiled program that is found in the cache."""

  def report(name, **_):
    if name == '/jax/compilation_cache/cache_hits':
      print('cache hit', flush=True)

  jax.monitoring.register_event_listener(report)


def hold(workdir, held):
  """Holds a workdir until it is told to let go, and says by which process."""
  with workdirs.lock(epath.Path(workdir)):
    held.send(os.getpid())
    held.recv()


class Small(nnx.Module):
  """Two layers with batch norm between them."""

  def __init__(self, rngs):
    self.hidden = nnx.Linear(6, 8, rngs=rngs)
    self.norm = nnx.BatchNorm(8, momentum=0.9, rngs=rngs)
    self.head = nnx.Linear(8, 3, rngs=rngs)

  def __call__(self, x):
    return self.head(nnx.relu(self.norm(self.hidden(x))))


def call_python_together(folder, port, num_processes, process):
  """Calls Python's functions as one process of several; each writes what it got."""
  log = os.open(folder / f'log{process}', os.O_WRONLY | os.O_CREAT)
  os.dup2(log, 1)
  os.dup2(log, 2)
  jax.config.update('jax_num_cpu_devices', 1)
  jax.distributed.initialize(f'localhost:{port}', num_processes, process)
  found = call_python(folder, process)
  (folder / f'{process}.json').write_text(json.dumps(found))
  atexit._run_exitfuncs()  # in which JAX takes leave of the other processes


def call_python(folder, process=None):
  """Searches and evaluates from Python; returns what is found.

  Args:
    folder: for the workdirs.
    process: of several, which then make calls that are refused too.
  """
  rng = np.random.default_rng(0)
  image = rng.normal(size=(21, 6)).astype(np.float32)
  label = np.argmax(image[:, :3], axis=1)
  cut = lambda *cuts: [{'image': image[a:b], 'label': label[a:b]} for a, b in cuts]
  # Batches that the devices divide, and others.
  train, evaluation = cut((0, 8), (8, 16)), cut((0, 16), (16, 18), (18, 21))
  fields = {
    'num_steps': 4, 'num_samples': 2, 'formats': 'int4,int8', 'target_format': 'int4',
    'target_scale': 1.5, 'warmup_steps': 0, 'learning_rate': 1e-2, 'log_every': 2,
  }  # fmt: skip
  model = Small(nnx.Rngs(0))
  result = fliqs_jax.search(
    model, train, evaluation, workdir=folder / 'search', **fields
  )
  result.save(folder / 'saved')
  found = {
    'formats': dict(result.formats),
    'eval': dict(result.eval),
    'history': result.history,
    'evaluated': fliqs_jax.evaluate(
      model, evaluation, folder / 'saved', formats='int4'
    ),
  }
  if process is None:
    return found
  errors = []
  other = {'workdir': folder / 'other'}
  calls = (
    (cut((process, 8 + process)), other),
    (train, other | {'seed': process}),
    (train, {}),
  )
  for batches, more in calls:
    try:
      fliqs_jax.search(model, batches, evaluation, **fields, **more)
    except ConfigError as error:
      errors.append(str(error))
  return {**found, 'errors': errors}


def limit_files(limit):
  """Lets no file grow beyond some bytes, as on a disk that is full."""
  jax.config.update('jax_enable_compilation_cache', False)  # whose files others read
  resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
