"""Iterators over batches, and those over a user's own."""

import base64
from collections.abc import Callable, Iterable, Iterator, Mapping
import inspect
import itertools
import json
from typing import Any, Protocol

import jax
import numpy as np

from fliqs_jax.errors import ConfigError

# A factory that makes iterators, something that can be iterated again, or an iterator.
Source = Callable[[], Iterable[Any]] | Iterable[Any]
Check = Callable[[Any], None]  # of a batch in numpy; raises ConfigError

# The arguments of `fliqs_jax.search` and `train`, as messages name them.
_TRAIN, _EVALUATION = 'train_batches', 'eval_batches'

_EXPECTED = (
  'expected a list of batches, an iterator over them, or a function without arguments '
  "that returns one; a batch is a dict of arrays, as {'image': [B, ...], 'label': [B]}"
)


def batch_size(batch: Any, name: str) -> int:
  """Returns the number of examples of a batch.

  Raises:
    ConfigError: where its entries are not arrays that share a leading axis, or it has
      no examples.
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
  (size,) = sizes.pop()
  if not size:
    raise ConfigError(f'{name}: a batch has no examples: expected one or more')
  return size


def to_arrays(batch: Any, name: str) -> Any:
  """Returns a batch in numpy, in the dtypes that JAX computes in.

  Args:
    batch: the batch.
    name: of its source, for messages.

  Raises:
    ConfigError: where it holds something else than numbers.
  """

  def to_array(path, leaf):
    array = np.asarray(leaf)
    if array.dtype.kind in 'OSUMm':
      entry = jax.tree_util.keystr(path)
      raise ConfigError(f'{name}: {entry} holds {array.dtype}: expected numbers alone')
    return np.asarray(array, jax.dtypes.canonicalize_dtype(array.dtype))

  return jax.tree_util.tree_map_with_path(to_array, batch)


def first_batch(source: Source, name: str) -> tuple[Any, Source]:
  """Returns the first batch, and a source that still has it.

  Raises:
    ConfigError: where the source is none, has no batch, or the batch holds something
      else than numbers.
  """
  iterator = _iterate(source, name)
  position = _position(iterator, name)
  batch = next(iterator, _END)
  if batch is _END:
    raise ConfigError(f'{name} is empty: expected batches of examples')
  arrays = to_arrays(batch, name)
  if position is not None:
    _go_to(iterator, position)
  elif iterator is source:
    source = itertools.chain([batch], iterator)
  return arrays, source


_END = object()


def _iterate(source, name):
  """Returns an iterator over a source's batches.

  Raises:
    ConfigError: where it is no source; one line that names it.
  """
  if callable(source):
    try:
      inspect.signature(source).bind()
    except TypeError as error:
      raise ConfigError(f'{name} is a function with {error}: {_EXPECTED}') from None
    except ValueError:  # of a builtin, which tells no signature
      pass
    source, name = source(), f'{name}()'
  if isinstance(source, Mapping):
    given = f'{name} is one {type(source).__name__} of {", ".join(map(str, source))}'
    raise ConfigError(f'{given}: {_EXPECTED}')
  if hasattr(source, 'shape'):
    raise ConfigError(f'{name} is one array {np.shape(source)}: {_EXPECTED}')
  if isinstance(source, str | bytes) or not hasattr(source, '__iter__'):
    raise ConfigError(f'{name}={source!r}: {_EXPECTED}')
  return iter(source)


def _position(iterator, name):
  """Returns an iterator's own position, ready for JSON; None where it tells none.

  Raises:
    ConfigError: where the position can be kept in no checkpoint.
  """
  if not hasattr(iterator, 'get_state') or not hasattr(iterator, 'set_state'):
    return None
  state = iterator.get_state()
  if isinstance(state, bytes):  # as those of `grain.DataLoader`
    return {_BYTES: base64.b64encode(state).decode()}
  try:
    return json.loads(json.dumps(state))
  except (TypeError, ValueError) as error:
    raise ConfigError(
      f'{name}: the get_state() of its iterator returns what no checkpoint can keep '
      f'({error}): expected bytes, or what JSON has'
    ) from None


_BYTES = 'base64'


def _go_to(iterator, position):
  is_bytes = isinstance(position, dict) and set(position) == {_BYTES}
  iterator.set_state(base64.b64decode(position[_BYTES]) if is_bytes else position)


def alike(name: str, first: Any, check: Check) -> Check:
  """Returns the check that a batch is like the first one, and passes another check.

  Args:
    name: of the source, for messages.
    first: the first batch, in numpy.
    check: of the values; its messages are given the source's name.
  """
  expected = _entries(first)

  def check_batch(batch):
    found = _entries(batch)
    for entry in {**expected, **found}:
      if found.get(entry) != expected.get(entry):
        raise ConfigError(
          f'{name}: a batch has {found.get(entry, "nothing")} in {entry or "it"} where '
          f'the first one has {expected.get(entry, "nothing")}: expected every batch '
          'like the first, but for the number of examples'
        )
    try:
      check(batch)
    except ConfigError as error:
      raise ConfigError(*(f'{name}: {line}' for line in error.problems)) from None

  return check_batch


def check_list(
  name: str, source: Source, first: Any, check: Check, of_one_size: bool = False
) -> None:
  """Checks all batches of a list, so that none stops a run that has begun.

  Others are checked as they come.

  Args:
    name: of the source, for messages.
    source: of any kind.
    first: the first batch, in numpy.
    check: as in `alike`.
    of_one_size: whether those of another size than the first one are not used.
  """
  if not isinstance(source, list | tuple):
    return
  check, size = alike(name, first, check), batch_size(first, name)
  for batch in source:
    if batch_size(batch, name) == size or not of_one_size:
      check(to_arrays(batch, name))


def _entries(batch):
  """Returns `{entry: dtype[B, ...]}` of a batch in numpy, in words."""
  return {
    jax.tree_util.keystr(path): f'{a.dtype}[{", ".join(map(str, ("B", *a.shape[1:])))}]'
    for path, a in jax.tree_util.tree_leaves_with_path(batch)
  }


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

  def __init__(
    self,
    source: Source,
    num_samples: int,
    size: int,
    check: Check = lambda batch: None,
  ):
    """Starts at the beginning of a source.

    Args:
      source: of batches with `size` examples.
      num_samples: S.
      size: B.
      check: of each batch in numpy, before it is taken.
    """
    self._source, self._num_samples, self._size = source, num_samples, size
    self._check = check
    self._iterator, self._taken = self._restart(), 0

  def _restart(self):
    return _iterate(self._source, _TRAIN)

  def __iter__(self) -> 'TrainBatches':
    return self

  def __next__(self) -> Any:
    batch = self._next_whole()
    if batch is None and self._iterator is not self._source:
      self._iterator = self._restart()
      batch = self._next_whole()
    if batch is None:
      raise StopIteration
    self._taken += 1
    return jax.tree.map(lambda a: a.reshape(self._num_samples, -1, *a.shape[1:]), batch)

  def _next_whole(self):
    for batch in self._iterator:
      size = batch_size(batch, _TRAIN)
      if size > self._size:
        raise ConfigError(
          f'train_batches: a batch of {size} examples after one of {self._size}: '
          'expected one size, but for smaller last ones, which are left out'
        )
      if size == self._size:
        batch = to_arrays(batch, _TRAIN)
        self._check(batch)
        return batch

  def get_state(self) -> dict[str, Any]:
    """Returns the position, ready for JSON."""
    position = _position(self._iterator, _TRAIN)
    source = {} if position is None else {'source': position}
    return {'taken': self._taken, **source}

  def set_state(self, state: dict[str, Any]) -> None:
    """Goes to a position: of the source's own, or by taking as many batches again."""
    if 'source' in state:
      _go_to(self._iterator, state['source'])
      self._taken = state['taken']
    while self._taken < state['taken']:
      next(self)


def eval_batches(source: Source, check: Check = lambda batch: None) -> Iterator[Any]:
  """Yields the batches of a source, which may be of several sizes.

  Args:
    source: of the batches.
    check: of each batch in numpy.
  """
  for batch in _iterate(source, _EVALUATION):
    batch_size(batch, _EVALUATION)
    batch = to_arrays(batch, _EVALUATION)
    check(batch)
    yield batch
