"""Seconds of each phase of a first search on the digits, with nothing kept from before.

    python benchmarks/first_run.py [--num_steps=1500] [--repeats=3]

Each repeat is a process of its own, with an empty folder for datasets and for compiled
programs, as after an installation. It does what `python -m fliqs_jax.main
--config=configs/resnet18.py:digits` does, and times the functions that take the time,
each without those that it calls. The figures are medians.
"""

import argparse
import collections
import contextlib
import functools
import importlib.util
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

CONFIG = pathlib.Path(__file__).parents[1] / 'configs' / 'resnet18.py'

# Phases in the order in which they begin.
PHASES = (
  'imports',
  'dataset and checks',
  'first state',
  'compiling the step',
  'steps',
  'batch norm',
  'evaluation',
  'report',
  'all else',
)


class Phases:
  """Seconds by phase; a phase within another one interrupts it."""

  def __init__(self):
    self.seconds = collections.Counter()
    self._open, self._since = ['all else'], time.perf_counter()

  def _switch(self):
    now = time.perf_counter()
    self.seconds[self._open[-1]] += now - self._since
    self._since = now

  @contextlib.contextmanager
  def phase(self, name):
    self._switch()
    self._open.append(name)
    try:
      yield
    finally:
      self._switch()
      self._open.pop()

  def timed(self, owner, attribute, name):
    """Times every call of a module's function."""
    function = getattr(owner, attribute)

    @functools.wraps(function)
    def call(*args, **kwargs):
      with self.phase(name):
        return function(*args, **kwargs)

    setattr(owner, attribute, call)


def run_once(num_steps, folder):
  """Runs the search in this process; returns the seconds by phase."""
  phases = Phases()
  with phases.phase('imports'):
    import jax

    from fliqs_jax.reporting import page
    from fliqs_jax.runs import evaluation, loop, preparation

  phases.timed(preparation, 'prepare', 'dataset and checks')
  phases.timed(evaluation, 'initial_state', 'first state')
  phases.timed(loop, '_reestimate', 'batch norm')
  make_step, make_evaluate = loop.make_step, evaluation.make_evaluate

  def make_timed_step(*args):
    step, taken = make_step(*args), []

    def call(*args):
      name = 'steps' if taken else 'compiling the step'
      taken.append(name)
      with phases.phase(name):
        return jax.block_until_ready(step(*args))

    return call

  def make_timed_evaluate(*args):
    evaluate = make_evaluate(*args)

    def call(*args):
      with phases.phase('evaluation'):
        return evaluate(*args)

    return call

  loop.make_step, evaluation.make_evaluate = make_timed_step, make_timed_evaluate
  loop.run(load_config(num_steps, folder), folder / 'run')
  with phases.phase('report'):
    page.write_report([str(folder / 'run')])
  with phases.phase('all else'):  # counts what is open
    pass
  return phases.seconds


def load_config(num_steps, folder):
  spec = importlib.util.spec_from_file_location('resnet18_config', CONFIG)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  config = module.get_config('digits')
  config.num_steps = num_steps
  config.input.data_dir = str(folder / 'tfds')
  config.compilation_cache = str(folder / 'compiled')
  return config


def main():
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--num_steps', type=int, default=1500, help='of the search')
  parser.add_argument('--repeats', type=int, default=3)
  parser.add_argument('--folder', help='of the one run of this process')
  args = parser.parse_args()
  if args.folder:
    print(json.dumps(run_once(args.num_steps, pathlib.Path(args.folder))))
    return
  runs = []
  for _ in range(args.repeats):
    with tempfile.TemporaryDirectory() as folder:
      command = [sys.executable, __file__, '--folder', folder]
      command += ['--num_steps', str(args.num_steps)]
      began = time.perf_counter()
      done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
      runs.append(json.loads(done.stdout.splitlines()[-1]))
      runs[-1]['whole process'] = time.perf_counter() - began
  print('| phase | seconds |\n|---|---|')
  for name in (*PHASES, 'whole process'):
    print(f'| {name} | {statistics.median(run.get(name, 0) for run in runs):.1f} |')


if __name__ == '__main__':
  main()
