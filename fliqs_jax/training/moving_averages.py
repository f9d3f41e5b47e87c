"""Moving averages among running statistics: which they are, and what they average.

An update of a moving average is `m · old + (1 − m) · batch`, with one momentum m in
[0, 1) and a `batch` that no old statistic changes. Other statistics are not of this
kind: those of a frozen batch norm stay as they are, and the vector of spectral norm is
an iteration. What an update makes of chosen old values tells them apart.
"""

from collections.abc import Callable, Iterable
import functools
from typing import Any, NamedTuple

import jax
import numpy as np

from fliqs_jax.training.task import Batch


class Probe(NamedTuple):
  """Leaves of the statistics as an update of chosen old values shows them."""

  momenta: list[np.ndarray]  # of each leaf, shaped like it; means nothing in others
  average: np.ndarray  # shape=(leaves,), dtype=bool; a moving average, all finite
  fixed: np.ndarray  # shape=(leaves,), dtype=bool; the update returns the old values


def probe(update: Callable[[Any], Any], old: Any, probed: np.ndarray) -> Probe:
  """Returns what an update of one batch shows of the leaves that are probed.

  Args:
    update: from old statistics to new ones. It is called three times.
    old: the statistics, which the leaves that are not probed keep.
    probed: bool[leaves], in the order of `jax.tree.leaves`.
  """
  leaves = jax.tree.leaves(old)

  def update_from(values):
    return jax.tree.leaves(update(_replaced(old, probed, values)))

  from_zero = update_from([0] * len(leaves))
  with np.errstate(all='ignore'):  # what is not finite is found below
    # As large as the update, so that neither rounds the other away.
    scales = [
      (1 + np.max(np.abs(zero), initial=0)).astype(leaf.dtype)
      for zero, leaf in zip(from_zero, leaves, strict=True)
    ]
    # Of both signs and unequal sizes: a maximum is affine on one side of the batch's
    # value, and a normalised vector changes its sign with the old one's.
    from_one = update_from(scales)
    from_minus_two = update_from([-2 * scale for scale in scales])
    results = zip(leaves, scales, from_zero, from_one, from_minus_two, strict=True)
    momenta, average, fixed = zip(*(_compare(*r) for r in results), strict=True)
  return Probe(list(momenta), probed & np.array(average), probed & np.array(fixed))


def reestimate(
  update: Callable[[Batch, Any], Any], old: Any, batches: Iterable[Batch]
) -> tuple[Any, list[str]]:
  """Returns statistics with the mean over batches of what is averaged, and the rest.

  Leaves that are no moving averages, or not finite on any batch, stay as they are.

  Args:
    update: what a batch makes of old statistics, both in numpy.
    old: the statistics.
    batches: at least one. The first one tells the moving averages.

  Returns:
    The new statistics, and the paths of the leaves that stay as they are.
  """
  paths, structure = jax.tree.flatten_with_path(old)
  leaves = [leaf for _, leaf in paths]
  total, counts = [0] * len(leaves), np.zeros(len(leaves), int)
  found = None
  for batch in batches:
    if found is None:
      found = find(functools.partial(update, batch), old)
      zeros = _replaced(old, found.average, [0] * len(leaves))
    for index, new in enumerate(jax.tree.leaves(update(batch, zeros))):
      if found.average[index] and np.all(np.isfinite(new)):
        total[index] = total[index] + new / (1 - found.momenta[index])
        counts[index] += 1
  new = [
    (added / int(count)).astype(leaf.dtype) if count else leaf
    for leaf, added, count in zip(leaves, total, counts, strict=True)
  ]
  kept = [
    jax.tree_util.keystr(path, simple=True, separator='/')
    for (path, _), count in zip(paths, counts, strict=True)
    if not count
  ]
  return structure.unflatten(new), kept


def find(update: Callable[[Any], Any], old: Any) -> Probe:
  """Returns the moving averages among the statistics when probed together.

  A leaf that changes the network changes what the layers behind it average. A group is
  therefore halved until all its leaves are averages. Batch norm alone takes one probe.

  Args:
    update: what one batch makes of old statistics.
    old: the statistics.
  """
  num_leaves = len(jax.tree.leaves(old))
  found = Probe([], *np.zeros((2, num_leaves), bool))

  def add(group):
    nonlocal found
    if not group.size:
      return
    together = found.average.copy()
    together[group] = True
    result = probe(update, old, together)
    rest = group[~result.fixed[group]]
    if np.array_equal(result.average, together):
      found = result
    elif rest.size < group.size:
      add(rest)
    elif group.size > 1:
      for half in np.array_split(group, 2):
        add(half)

  add(np.arange(num_leaves))
  return found


def _replaced(old, replaced, values):
  """Returns statistics with a value in place of every element of chosen leaves."""
  leaves, structure = jax.tree.flatten(old)
  new = [
    np.full(leaf.shape, value, leaf.dtype) if use and _can_average(leaf) else leaf
    for leaf, value, use in zip(leaves, values, replaced, strict=True)
  ]
  return structure.unflatten(new)


def _can_average(leaf):
  return jax.numpy.issubdtype(leaf.dtype, np.floating) and leaf.size > 0


def _compare(leaf, scale, from_zero, from_one, from_minus_two):
  """Returns `momenta`, `average` and `fixed` of one leaf; see `Probe`."""
  if not _can_average(leaf):
    return np.zeros(leaf.shape), False, True
  epsilon = jax.numpy.finfo(leaf.dtype).eps
  tolerance = epsilon**0.5  # far above rounding, far below another kind of update
  momentum = (from_one - from_zero) / scale
  size = np.max(np.abs(np.stack([from_zero, from_one, from_minus_two])))
  bend = np.max(np.abs(from_minus_two - (from_zero - 2 * scale * momentum)))
  # A comparison with NaN is false.
  average = (
      (np.ptp(momentum) <= tolerance) & (bend <= tolerance * size)
      & (np.min(momentum) >= -tolerance) & (np.max(momentum) < 1 - 4 * epsilon)
      & np.isfinite(size)
  )  # fmt: skip
  fixed = np.all(
    (from_zero == 0) & (from_one == scale) & (from_minus_two == -2 * scale)
  )
  return momentum, average, fixed
