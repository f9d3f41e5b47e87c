"""Runs that are killed or told to stop, and started again."""

import random
import signal
import time

import child_functions
import pytest
import whole_runs

from fliqs_jax.runs.distributed import Preemption

# Enough checkpoints that no run ends before it has been killed as often as it shall be.
LONG = {'num_steps': 60, 'checkpoint_every': 3, 'log_every': 5}
MOMENTS = 'start', 'checkpoint', 'line'  # at which each of two runs is killed


@pytest.fixture(scope='module')
def cache(tmp_path_factory):
  return tmp_path_factory.mktemp('cache')


@pytest.fixture(scope='module')
def start(data_dir, cache):
  """Starts the long run in a workdir."""

  def start(workdir, **kwargs):
    log = f'{workdir}.log'
    return whole_runs.start(workdir, data_dir, cache, log, **LONG, **kwargs)

  return start


@pytest.fixture(scope='module')
def uninterrupted(start, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('uninterrupted') / 'run'
  assert whole_runs.finish(start(workdir)) == 0
  return workdir


def kill_at(moment, process, workdir, rng):
  """Kills while it starts, writes a checkpoint, or is anywhere near a line."""
  began = time.monotonic()
  checkpoints = lambda: len(list(workdir.glob('checkpoints/*')))
  lines = lambda: (workdir / 'history.jsonl').read_text().count('\n')
  if moment == 'start':
    delay = rng.uniform(0, 3)
    whole_runs.wait_until(lambda: time.monotonic() - began > delay, process)
  elif moment == 'checkpoint' or not (workdir / 'history.jsonl').exists():
    known = checkpoints()
    whole_runs.wait_until(lambda: checkpoints() != known, process)
  else:
    known = lines()
    whole_runs.wait_until(lambda: lines() != known, process)
  time.sleep(rng.uniform(0, 0.05))
  process.kill()
  # 255 where the other thread, as it started its next run, has read the status.
  assert whole_runs.finish(process) in (-signal.SIGKILL, 255)


def test_killed_at_six_moments(start, uninterrupted, tmp_path):
  workdir, rng = tmp_path / 'run', random.Random(0)
  for moment in rng.sample(MOMENTS, len(MOMENTS)):
    kill_at(moment, start(workdir), workdir, rng)
  assert whole_runs.finish(start(workdir)) == 0
  assert whole_runs.read_result(workdir) == whole_runs.read_result(uninterrupted)
  assert whole_runs.read_history(workdir) == whole_runs.read_history(uninterrupted)


def test_stopped_by_sigterm_goes_on(start, uninterrupted, cache, tmp_path):
  workdir = tmp_path / 'run'
  process = start(workdir)
  whole_runs.wait_until((workdir / 'history.jsonl').exists, process)
  time.sleep(0.5)
  process.terminate()
  assert whole_runs.finish(process) == 75
  *_, line = (tmp_path / 'run.log').read_text().splitlines()
  (newest, *_) = sorted(map(int, (p.name for p in workdir.glob('checkpoints/*'))))[::-1]
  assert line == f'error: stopped by SIGTERM at step {newest}: start me again to go on'
  assert whole_runs.read_history(workdir)[-1]['step'] == newest
  programs = list(cache.glob('jit_search_step*-cache'))
  continued = start(workdir, prepare=child_functions.report_cache_hits)
  assert whole_runs.finish(continued) == 0
  # It compiled no step again.
  assert len(programs) == 1 and list(cache.glob('jit_search_step*-cache')) == programs
  assert 'cache hit' in (tmp_path / 'run.log').read_text()
  assert whole_runs.read_result(workdir) == whole_runs.read_result(uninterrupted)
  steps = [line['step'] for line in whole_runs.read_history(workdir)]
  expected = [line['step'] for line in whole_runs.read_history(uninterrupted)]
  assert steps == sorted({*expected, newest})


def test_a_full_disk_is_explained_and_costs_no_checkpoint(
  start, uninterrupted, tmp_path
):
  workdir = tmp_path / 'run'
  assert whole_runs.finish(start(workdir, prepare=child_functions.fill_the_disk)) == 1
  log = (tmp_path / 'run.log').read_text()
  *_, line = log.splitlines()
  assert line.startswith('error: cannot write'), log
  assert 'File too large' in line and 'Traceback' not in log, log
  assert (workdir / 'checkpoints' / '3').is_dir()
  assert whole_runs.finish(start(workdir)) == 0
  assert whole_runs.read_result(workdir) == whole_runs.read_result(uninterrupted)
  assert whole_runs.read_history(workdir) == whole_runs.read_history(uninterrupted)


def test_the_first_ctrl_c_waits_for_a_step_and_the_second_leaves():
  with Preemption() as preemption:
    assert not preemption.reached(1)
    signal.raise_signal(signal.SIGINT)
    assert preemption.reached(2) and preemption.signal_name == 'SIGINT'
    with pytest.raises(KeyboardInterrupt):
      signal.raise_signal(signal.SIGINT)
  assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
