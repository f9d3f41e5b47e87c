"""Times of calls on the device at hand, taken in turns so that they compare."""

from collections.abc import Callable, Sequence
import statistics
import time
from typing import Any

import jax


def medians(
  calls: Sequence[Callable[[], Any]], repeats: int, at_once: int = 1
) -> list[float]:
  """Returns the median seconds of each call, after a warm-up.

  Whatever else the machine does meanwhile slows all of them.

  Args:
    calls: return arrays, which are waited for.
    repeats: times of which the median counts.
    at_once: calls that are dispatched and timed together, so that a device is not
      waited for.
  """
  samples = [[] for _ in calls]
  for repeat in range(repeats + 1):
    for call, taken in zip(calls, samples):
      start = time.perf_counter()
      jax.block_until_ready([call() for _ in range(at_once)])
      if repeat > 0:
        taken.append((time.perf_counter() - start) / at_once)
  return [statistics.median(taken) for taken in samples]
