"""Functions that tests call in other processes.

Such a process imports them by the name of their module, so that it must be one that is
found beside `conftest.py`: modules of tests in folders are not.
"""

import os
import resource
import time

from etils import epath
import jax
import numpy as np

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
