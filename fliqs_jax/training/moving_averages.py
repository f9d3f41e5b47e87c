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
import jax.numpy as jnp
import numpy as np

from fliqs_jax.training.task import Batch


class Probe(NamedTuple):
  """Leaves of the statistics as an update of chosen old values shows them."""

  batch: Any  # the batch's own values of the averages, zeros in other leaves
  average: jax.Array  # shape=(leaves,), dtype=bool; a moving average, all finite
  fixed: jax.Array  # shape=(leaves,), dtype=bool; the update returns the old values


def probe(update: Callable[[Any], Any], old: Any, probed: jax.Array) -> Probe:
  """Returns what an update of one batch shows of the leaves that are probed.

  Args:
    update: from old statistics to new ones. It is called three times; the compiler
      computes a network once where it depends on no probed leaf.
    old: the statistics, which the leaves that are not probed keep.
    probed: bool[leaves], in the order of `jax.tree.leaves`.
  """
  leaves, structure = jax.tree.flatten(old)

  def update_from(values):
    moved = [
      jnp.where(is_probed, value, leaf).astype(leaf.dtype)
      if _can_average(leaf)
      else leaf
      for leaf, value, is_probed in zip(leaves, values, probed, strict=True)
    ]
    return structure.flatten_up_to(update(structure.unflatten(moved)))

  from_zero = update_from([0] * len(leaves))
  # As large as the update, so that neither rounds the other away.
  scales = [
    1 + jnp.max(jnp.abs(zero), initial=0).astype(leaf.dtype)
    for zero, leaf in zip(from_zero, leaves, strict=True)
  ]
  # Of both signs and unequal sizes: a maximum is affine on one side of the batch's
  # value, and a normalised vector changes its sign with the old one's.
  from_one = update_from(scales)
  from_minus_two = update_from([-2 * scale for scale in scales])
  results = zip(leaves, scales, from_zero, from_one, from_minus_two, strict=True)
  batch, average, fixed = zip(*(_compare(*result) for result in results), strict=True)
  average = probed & jnp.stack(average)
  batch = [jnp.where(a, value, 0) for a, value in zip(average, batch, strict=True)]
  return Probe(structure.unflatten(batch), average, probed & jnp.stack(fixed))


def reestimate(
  probe_batch: Callable[[Batch, np.ndarray], Probe], old: Any, batches: Iterable[Batch]
) -> tuple[Any, list[str]]:
  """Returns statistics with the mean over batches of what is averaged, and the rest.

  Leaves that are no moving averages, or not finite on any batch, stay as they are.

  Args:
    probe_batch: `probe` of one batch, from the batch and `probed`.
    old: the statistics.
    batches: at least one. The first one tells the moving averages.

  Returns:
    The new statistics, and the paths of the leaves that stay as they are.
  """
  paths_and_leaves, structure = jax.tree.flatten_with_path(old)
  total, counts = [0] * len(paths_and_leaves), np.zeros(len(paths_and_leaves), int)
  averages = None
  for batch in batches:
    if averages is None:
      averages = find(functools.partial(probe_batch, batch), len(counts))
    found = probe_batch(batch, averages)
    total = jax.tree.map(jnp.add, total, jax.tree.leaves(found.batch))
    counts += np.asarray(found.average)
  new = [
    (added / int(count)).astype(leaf.dtype) if count else leaf
    for (_, leaf), added, count in zip(paths_and_leaves, total, counts, strict=True)
  ]
  kept = [
    jax.tree_util.keystr(path, simple=True, separator='/')
    for (path, _), count in zip(paths_and_leaves, counts, strict=True)
    if not count
  ]
  return structure.unflatten(new), kept


def find(probe_leaves: Callable[[np.ndarray], Probe], num_leaves: int) -> np.ndarray:
  """Returns which leaves, bool[leaves], are moving averages when probed together.

  A leaf that changes the network changes what the layers behind it average. A group is
  therefore halved until all its leaves are averages. Batch norm alone takes one probe.

  Args:
    probe_leaves: `probe` of one batch, from `probed`.
    num_leaves: of the statistics.
  """
  found = np.zeros(num_leaves, bool)

  def add(group):
    nonlocal found
    if not group.size:
      return
    together = found.copy()
    together[group] = True
    result = probe_leaves(together)
    rest = group[~np.asarray(result.fixed)[group]]
    if np.array_equal(result.average, together):
      found = together
    elif rest.size < group.size:
      add(rest)
    elif group.size > 1:
      for half in np.array_split(group, 2):
        add(half)

  add(np.arange(num_leaves))
  return found


def _can_average(leaf):
  return jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.size > 0


def _compare(leaf, scale, from_zero, from_one, from_minus_two):
  """Returns `batch`, `average` and `fixed` of one leaf; see `Probe`."""
  if not _can_average(leaf):
    return jnp.zeros(leaf.shape), False, True
  epsilon = jnp.finfo(leaf.dtype).eps
  tolerance = epsilon**0.5  # far above rounding, far below another kind of update
  momentum = (from_one - from_zero) / scale
  batch = from_zero / (1 - momentum)
  size = jnp.max(jnp.abs(jnp.stack([from_zero, from_one, from_minus_two])))
  bend = jnp.max(jnp.abs(from_minus_two - (from_zero - 2 * scale * momentum)))
  # A comparison with NaN is false.
  average = (
      (jnp.ptp(momentum) <= tolerance) & (bend <= tolerance * size)
      & (jnp.min(momentum) >= -tolerance) & (jnp.max(momentum) < 1 - 4 * epsilon)
      & jnp.isfinite(size) & jnp.all(jnp.isfinite(batch))
  )  # fmt: skip
  fixed = jnp.all(
    (from_zero == 0) & (from_one == scale) & (from_minus_two == -2 * scale)
  )
  return batch, average, fixed
