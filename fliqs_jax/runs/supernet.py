"""Networks out of a supernet: the one that a search of the architecture found.

Its architecture comes from the file of a result, its weights are slices of those in the
supernet's checkpoint.
"""

from typing import Any

from etils import epath
from flax import traverse_util
import jax
import ml_collections

from fliqs_jax.errors import ConfigError
from fliqs_jax.runs import files
from fliqs_jax.runs.network import Architecture
from fliqs_jax.runs.result import RESULT_FILE
from fliqs_jax.training.train_state import TrainState


def read_architecture(config: ml_collections.ConfigDict) -> Architecture:
  """Returns the architecture that a config names, empty for the standard one.

  That of the file `config.architecture`, else of `config.formats` where this is a file
  that has one.

  Raises:
    ConfigError: where `config.architecture` is no file with an architecture, or that of
      `config.formats` is damaged; one line.
  """
  return _named_architecture(config) or {}


def evaluated_architecture(
  config: ml_collections.ConfigDict,
  source: epath.Path,
  trained: ml_collections.ConfigDict,
) -> Architecture:
  """Returns the architecture in which a checkpoint is evaluated.

  The one that the config names, or else the one that the run in `source` found or had.

  Args:
    config: of the evaluation.
    source: the folder of the run.
    trained: the run's config.

  Raises:
    ConfigError: where that run trained a network of another architecture; one line.
  """
  result = source / RESULT_FILE
  if result.is_file():
    own = _read(result)
  else:
    fixed = 'architecture' in trained and not holds_supernet(trained)
    own = read_architecture(trained) if fixed else {}
  named = _named_architecture(config)
  if named is None or named == own:
    return own
  if not holds_supernet(trained):
    raise ConfigError(
      f'{str(source)!r} holds a checkpoint of another architecture than '
      f'{config.architecture or config.formats!r}: only that of a search over '
      'architectures can be evaluated in any of them'
    )
  return named


def holds_supernet(trained: ml_collections.ConfigDict) -> bool:
  """Returns whether a run with this config searches the architecture."""
  # Runs of versions before this choice have formats alone.
  return trained.mode == 'search' and trained.search.get('decide') not in (
    None,
    'formats',
  )


def slice_state(supernet: TrainState, small: TrainState) -> TrainState:
  """Returns the state `small` with the variables of a supernet's state."""
  return small.replace(**{
      field: slice_variables(getattr(supernet, field), getattr(small, field))
      for field in ('params', 'batch_stats', 'quant_stats')
  })  # fmt: skip


def _named_architecture(config):
  """Returns the named architecture, None where the config leaves it open."""
  if config.architecture:
    return _read(config.architecture)
  if not config.formats or not files.to_path(config.formats).is_file():
    return None
  try:
    content = files.read_json(config.formats)
  except ConfigError:
    return None  # what is wrong with the file, the reader of its formats says
  # Formats that were written by hand leave the architecture open.
  return _parse(content, config.formats) if 'architecture' in content else None


def _read(path):
  return _parse(files.read_json(path), path)


def _parse(content, path):
  architecture = content.get('architecture')
  if not isinstance(architecture, dict) or not all(
    type(size) is int for size in architecture.values()
  ):
    raise ConfigError(
      f'{str(path)!r} holds no "architecture" of integers: expected a {RESULT_FILE}'
    )
  return architecture


def slice_variables(variables: Any, shapes: Any) -> Any:
  """Returns the variables of a small network from those of its supernet.

  Channels are the first ones of the supernet's, convolution kernels the centre of
  theirs in space, as `architecture` has it. Layers that the small network lacks drop
  out. This is for networks that pool their features before a dense layer; flattened,
  they would have channels of another order.

  Args:
    variables: a tree of arrays.
    shapes: the small network's tree, of anything that has a shape.

  Raises:
    KeyError: where the supernet lacks a variable of the small network.
  """
  whole = traverse_util.flatten_dict(variables)
  return traverse_util.unflatten_dict({
      path: _slice(whole[path], small.shape, is_kernel=path[-1] == 'kernel')
      for path, small in traverse_util.flatten_dict(shapes).items()
  })  # fmt: skip


def _slice(array: jax.Array, shape: tuple[int, ...], is_kernel: bool) -> jax.Array:
  slices = []
  for axis, (whole, small) in enumerate(zip(array.shape, shape, strict=True)):
    # The last two axes of a kernel are its channels, the others are in space.
    in_space = is_kernel and axis < array.ndim - 2
    start = (whole - small) // 2 if in_space else 0
    slices.append(slice(start, start + small))
  return array[tuple(slices)]
