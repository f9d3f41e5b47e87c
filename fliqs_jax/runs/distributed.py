"""Several processes: how they find each other, work on the same, and stop together."""

from collections.abc import Mapping
import signal
import threading
from typing import Any
import zlib

import jax
from jax.experimental import multihost_utils
import numpy as np

from fliqs_jax.errors import ConfigError


def initialize(
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  detect: bool = False,
) -> None:
  """Joins this process to the others; does nothing where nothing is given.

  Before anything asks for a device.

  Args:
    coordinator: `HOST:PORT` of process 0.
    num_processes: of the run.
    process_id: of this process, from 0 on.
    detect: find the three in the environment, as TPU VMs, GKE and Slurm have them.

  Raises:
    ConfigError: where the arguments make no sense together, or nobody answers.
  """
  given = {
    'coordinator': coordinator,
    'num_processes': num_processes,
    'process_id': process_id,
  }
  if not detect and set(given.values()) == {None}:
    return
  if problem := _problem(detect, **given):
    raise ConfigError(problem)
  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  try:
    if detect:
      jax.distributed.initialize()
    else:
      jax.distributed.initialize(coordinator, num_processes, process_id)
  except (RuntimeError, ValueError) as error:
    where = 'the cluster of --distributed' if detect else f'--coordinator={coordinator}'
    reason = str(error).splitlines()[0]
    raise ConfigError(f'cannot join the other processes by {where}: {reason}') from None


def _problem(detect, coordinator, num_processes, process_id):
  given = {
    '--coordinator=HOST:PORT': coordinator,
    '--num_processes=N': num_processes,
    '--process_id=I': process_id,
  }
  missing = [flag for flag, value in given.items() if value is None]
  if detect:
    if len(missing) < len(given):
      return (
        '--distributed finds the processes by itself: expected no other flag of them'
      )
  elif missing:
    return f'{", ".join(missing)} missing: expected all of {", ".join(given)}, or none'
  elif (
    not coordinator.rpartition(':')[0] or not coordinator.rpartition(':')[2].isdigit()
  ):
    return f'--coordinator={coordinator}: expected HOST:PORT of process 0'
  elif num_processes < 1:
    return f'--num_processes={num_processes}: expected 1 or more'
  elif not 0 <= process_id < num_processes:
    return f'--process_id={process_id}: expected one from 0 to {num_processes - 1}'


def check_alike(given: Mapping[str, Any]) -> None:
  """Checks that all processes were given the same, else they would wait for each other.

  Args:
    given: trees of arrays, or what JSON has, by the names of the arguments.

  Raises:
    ConfigError: in all processes, with the names of what differs.
  """
  if jax.process_count() == 1:
    return
  own = np.array([_checksum(tree) for tree in given.values()], np.uint32)
  everywhere = multihost_utils.process_allgather(own)
  differing = np.any(everywhere != everywhere[0], axis=0)
  if names := [name for name, differs in zip(given, differing) if differs]:
    raise ConfigError(
      f'{", ".join(names)}: not the same in all {jax.process_count()} processes: '
      'expected all of a batch and one configuration everywhere; each process takes '
      'its own part of the examples'
    )


def _checksum(tree):
  total = 0
  for path, leaf in jax.tree.leaves_with_path(tree):
    array = hasattr(leaf, 'dtype')
    content = np.asarray(leaf).tobytes() if array else repr(leaf).encode()
    total = zlib.crc32(content, zlib.crc32(str(path).encode(), total))
  return total


def raise_everywhere(problem: str | None) -> None:
  """Raises the problem of process 0, if it has one, in all processes.

  Args:
    problem: the line, of process 0.

  Raises:
    ConfigError: the line; in the others one that says where to look for it.
  """
  refused = problem is not None
  if jax.process_count() > 1:
    refused = bool(multihost_utils.broadcast_one_to_all(np.array(refused)))
  if refused:
    raise ConfigError(problem or 'process 0 cannot use the folder: see its own line')


def to_host(tree: Any) -> Any:
  """Returns arrays in numpy, in every process, wherever their parts are.

  Args:
    tree: of arrays, on devices of other processes too.
  """

  def whole(a):
    is_held = not isinstance(a, jax.Array) or a.is_fully_replicated
    if is_held or a.is_fully_addressable:
      return a
    return multihost_utils.process_allgather(a, tiled=True)

  return jax.device_get(jax.tree.map(whole, tree))


class Preemption:
  """Requests to stop by SIGTERM or SIGINT, which Ctrl-C sends. A context manager.

  The first request is remembered until a step ends. Signals then do again what they
  did before, so that a second Ctrl-C leaves at once.

  With `jax.distributed` JAX listens, and spreads the request of one process to all.
  Outside the main thread, where Python takes no signals, none is noticed.
  """

  def __init__(self):
    self._received = None
    self._previous = {}

  def __enter__(self) -> 'Preemption':
    if (
      not jax.distributed.is_initialized()
      and threading.current_thread() is threading.main_thread()
    ):
      for number in (signal.SIGTERM, signal.SIGINT):
        # A shell lets its background jobs ignore SIGINT.
        if signal.getsignal(number) is not signal.SIG_IGN:
          self._previous[number] = signal.signal(number, self._request)
    return self

  def __exit__(self, *_) -> None:
    self._restore()

  def _restore(self):
    while self._previous:
      signal.signal(*self._previous.popitem())

  def _request(self, number, _):
    self._received = number
    self._restore()

  @property
  def signal_name(self) -> str:
    """The name of the signal that came; JAX listens to SIGTERM alone."""
    return signal.Signals(self._received or signal.SIGTERM).name

  def reached(self, step: int) -> bool:
    """Returns whether to save and stop after this step, the same in all processes.

    To be called after every step.
    """
    if jax.distributed.is_initialized():
      return multihost_utils.reached_preemption_sync_point(step)
    return self._received is not None
