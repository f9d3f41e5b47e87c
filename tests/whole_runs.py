"""Commands as a user starts them, in processes that are cheap to start and to kill."""

import atexit
import faulthandler
import functools
import gc
import json
import multiprocessing
import os
import pathlib
import runpy
import signal
import socket
import sys
import tempfile
import time
from typing import Any, NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp

from fliqs_jax.reporting import page

ROOT = pathlib.Path(__file__).parents[1]

# Children of a process that has imported what the commands need, but no command, and
# asked for no device.
CONTEXT = multiprocessing.get_context('forkserver')
CONTEXT.set_forkserver_preload([
  'fliqs_jax.command_line', 'fliqs_jax.data.pipeline', 'fliqs_jax.reporting.page',
  'fliqs_jax.reporting.terminal', 'fliqs_jax.runs.distributed', 'fliqs_jax.runs.loop',
])  # fmt: skip


_FLAGS = {'coordinator', 'num_processes', 'process_id'}
_LIMIT = 500  # seconds: many times what any of these runs takes


class Smallest(nn.Module):
  """Three layers and batch norm, because what takes time here is starting."""

  num_classes: int
  width: float = 1.0
  small_images: bool = True  # as the configs of the digits say
  project_first_block: bool = False
  dtype: Any = jnp.float32
  conv: Any = nn.Conv
  dense: Any = nn.Dense

  @nn.compact
  def __call__(self, images, train):
    x = self.conv(4, (3, 3), strides=2, name='conv')(images)
    x = nn.relu(nn.BatchNorm(not train, momentum=0.9, name='norm')(x))
    x = nn.relu(self.dense(16, name='hidden')(x.reshape(len(x), -1)))
    return self.dense(self.num_classes, name='classifier')(x)


def start(workdir, data_dir, cache, log, num_devices=1, prepare=None, **fields):
  """Starts a search in the background and returns its process.

  Args:
    workdir: of the run.
    data_dir: of TFDS.
    cache: folder of compiled programs.
    log: path that takes the output.
    num_devices: of this process.
    prepare: a function that the process calls first.
    **fields: of the config, with `__` for a dot, and `_FLAGS`.
  """
  settings = {
    'model__name': 'smallest', 'input__data_dir': data_dir, 'compilation_cache': cache,
    'num_steps': 12, 'batch_size': 32, 'eval_batch_size': 128, 'checkpoint_every': 4,
    'log_every': 3, 'search__num_samples': 2, 'search__statistics_batches': 2, **fields,
  }  # fmt: skip
  arguments = ['--config=configs/resnet18.py:digits', f'--workdir={workdir}']
  arguments += [
    f'--{name}={value}'
    if name in _FLAGS
    else f'--config.{name.replace("__", ".")}={value}'
    for name, value in settings.items()
  ]
  prepare = functools.partial(_without_a_report, prepare)
  return _start('main', arguments, str(log), str(log), num_devices, prepare)


def _without_a_report(prepare):
  """Leaves out what takes as long as such a run, and prepares the rest."""
  page.write_report = lambda folders: 'none'
  if prepare:
    prepare()


def _start(module, arguments, log, output, num_devices=1, prepare=None, cwd=ROOT):
  options = module, arguments, log, output, num_devices, prepare, cwd
  process = CONTEXT.Process(target=_run_module, args=options, name=log)
  process.start()
  return process


class Finished(NamedTuple):
  """Exit status and output of a command, by the names of `subprocess.run`."""

  returncode: int
  stdout: str
  stderr: str


def command(module, *arguments, cwd=ROOT, prepare=None):
  """Runs `python -m fliqs_jax.MODULE …` in a folder.

  Args:
    module: name of the command.
    *arguments: of the command.
    cwd: the folder.
    prepare: a function that the process calls first.
  """
  with tempfile.TemporaryDirectory() as folder:
    log, output = (os.path.join(folder, name) for name in ('stderr', 'stdout'))
    process = _start(module, arguments, log, output, prepare=prepare, cwd=cwd)
    status = finish(process)
    return Finished(status, *(pathlib.Path(path).read_text() for path in (output, log)))


def finish(process):
  """Waits for the end of a run that was started and returns its exit status.

  Raises:
    AssertionError: where it hangs, with its log, in which all its threads' stacks are.
  """
  process.join(_LIMIT)
  _assert_ended(process)
  return process.exitcode


def wait_until(happened, *processes):
  """Returns once something has happened, or one of the runs has ended.

  Raises:
    AssertionError: as `finish` does, where neither comes.
  """
  latest = time.monotonic() + _LIMIT
  while all(process.is_alive() for process in processes) and not happened():
    if time.monotonic() > latest:
      for process in processes:
        _assert_ended(process)
    time.sleep(0.001)


def run(*args, **kwargs):
  """Runs a search to its end and returns its exit status."""
  return finish(start(*args, **kwargs))


def _assert_ended(process):
  if not process.is_alive():
    return
  os.kill(process.pid, signal.SIGABRT)  # at which it prints its stacks
  process.join(10)
  process.kill()
  text = pathlib.Path(process.name).read_text()
  raise AssertionError(f'{process.name} did not end within {_LIMIT} s:\n{text}')


def start_several(num_processes, workdir, data_dir, cache, log, **kwargs):
  """Starts a search on several processes; the log of each gets its number."""
  coordinator = f'localhost:{free_port()}'
  return [
    start(
        workdir, data_dir, cache, f'{log}{index}', coordinator=coordinator,
        num_processes=num_processes, process_id=index, **kwargs,
    )
    for index in range(num_processes)
  ]  # fmt: skip


def free_port():
  """Returns a port on which nothing listens."""
  with socket.socket() as listener:
    listener.bind(('localhost', 0))
    return listener.getsockname()[1]


def _run_module(module, arguments, log, output, num_devices, prepare, cwd):
  """Does what `python -m` does, in this process."""
  for path, stream in ((output, 1), (log, 2)):
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, stream)
  faulthandler.enable()
  gc.set_threshold(20_000, 20, 20)  # as in `conftest.py`
  os.chdir(cwd)
  sys.argv[1:] = arguments
  jax.config.update('jax_num_cpu_devices', num_devices)
  if any(argument.startswith('--config.compilation_cache=') for argument in arguments):
    jax.config.update('jax_compilation_cache_dir', None)  # that of the tests
  from fliqs_jax import models

  models.MODELS['smallest'] = Smallest
  if prepare:
    prepare()
  try:
    runpy.run_module(f'fliqs_jax.{module}', run_name='__main__', alter_sys=True)
  finally:
    atexit._run_exitfuncs()  # which such children skip, and JAX takes leave in


def read_history(workdir):
  """Returns the lines of the history, and checks that none is cut off."""
  return [json.loads(line) for line in (workdir / 'history.jsonl').open()]


def read_result(workdir):
  """Returns the result's text."""
  return (workdir / 'search_result.json').read_text()
