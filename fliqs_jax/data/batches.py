"""Iterators over batches, and those over a user's own."""

from collections.abc import Callable, Iterable, Iterator
import itertools
from typing import Any, Protocol

import jax
import numpy as np

from fliqs_jax.errors import ConfigError

# A factory that makes iterators, something that can be iterated again, or an iterator.
Source = Callable[[], Iterable[Any]] | Iterable[Any]


def batch_size(batch: Any, name: str) -> int:
  """Returns the number of examples of a batch.

  Raises:
    ConfigError: where its entries are not arrays that share a leading axis.
  """
  shapes = {
    jax.tree_util.keystr(path): np.shape(leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch)
  }
  sizes = {shape[:1] for shape in shapes.values()}
  if len(sizes) != 1 or () in sizes:
    raise ConfigError(
      f'{name}: expected a dict of arrays with the examples along the first axis, as '
      f"{{'image': [B, ...], 'label': [B]}}, found {shapes}"
    )
  return sizes.pop()[0]


def to_arrays(batch: Any) -> Any:
  """Returns a batch in numpy, in the dtypes that JAX computes in."""
  return jax.tree.map(
    lambda a: np.asarray(a, jax.dtypes.canonicalize_dtype(np.asarray(a).dtype)), batch
  )


def first_batch(source: Source, name: str) -> tuple[Any, Source]:
  """Returns the first batch, and a source that still has it.

  Raises:
    ConfigError: where there is none, or it holds something else than numbers.
    TypeError: where the source cannot be iterated.
  """
  iterator = _iterate(source)
  position = iterator.get_state() if hasattr(iterator, 'get_state') else None
  batch = next(iterator, None)
  if batch is None:
    raise ConfigError(f'{name} is empty: expected batches of examples')
  for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
    dtype = np.asarray(leaf).dtype
    if dtype.kind in 'OSUMm':
      entry = jax.tree_util.keystr(path)
      raise ConfigError(f'{name}: {entry} holds {dtype}: expected numbers alone')
  if position is not None:
    iterator.set_state(position)
  elif iterator is source:
    source = itertools.chain([batch], iterator)
  return to_arrays(batch), source


def _iterate(source):
  return iter(source() if callable(source) else source)


class BatchIterator(Protocol):
  """An iterator that tells and takes its position, as those of Grain do."""

  def __iter__(self) -> Iterator[Any]: ...

  def __next__(self) -> Any: ...

  def get_state(self) -> dict[str, Any]:
    """Returns the position, ready for JSON."""

  def set_state(self, state: dict[str, Any]) -> None:
    """Goes to a position."""


class TrainBatches:
  """Batches `[S, B / S, ...]` of a source of batches `[B, ...]`.

  A source that can be iterated again starts over when it ends; batches smaller than
  the first, as the last of an epoch may be, are left out. The position is the number of
  batches taken, unless the source's own iterator has `get_state` and `set_state`.
  """

  def __init__(self, source: Source, num_samples: int, size: int):
    """Starts at the beginning of a source whose batches have `size` examples."""
    self._source, self._num_samples, self._size = source, num_samples, size
    self._iterator, self._taken = _iterate(source), 0

  def __iter__(self) -> 'TrainBatches':
    return self

  def __next__(self) -> Any:
    batch = self._next_whole()
    if batch is None and self._iterator is not self._source:
      self._iterator = _iterate(self._source)
      batch = self._next_whole()
    if batch is None:
      raise StopIteration
    self._taken += 1
    return jax.tree.map(
      lambda a: a.reshape(self._num_samples, -1, *a.shape[1:]), to_arrays(batch)
    )

  def _next_whole(self):
    for batch in self._iterator:
      size = batch_size(batch, 'train_batches')
      if size > self._size:
        raise ConfigError(
          f'train_batches: a batch of {size} examples after one of {self._size}: '
          'expected one size, but for smaller last ones, which are left out'
        )
      if size == self._size:
        return batch

  def get_state(self) -> dict[str, Any]:
    """Returns the position, ready for JSON."""
    if hasattr(self._iterator, 'get_state'):
      return {'taken': self._taken, 'source': self._iterator.get_state()}
    return {'taken': self._taken}

  def set_state(self, state: dict[str, Any]) -> None:
    """Goes to a position: of the source's own, or by taking as many batches again."""
    if 'source' in state:
      self._iterator.set_state(state['source'])
      self._taken = state['taken']
    while self._taken < state['taken']:
      next(self)


def eval_batches(source: Source) -> Iterator[Any]:
  """Yields the batches of a source, which may be of several sizes."""
  for batch in _iterate(source):
    batch_size(batch, 'eval_batches')
    yield to_arrays(batch)
