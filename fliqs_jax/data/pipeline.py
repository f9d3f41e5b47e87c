"""Batches from TFDS datasets, read at random access through Grain.

Everything is a function of (seed, step): the order of examples, their augmentation,
and so the state of an iterator, which is a few bytes in a checkpoint.
"""

from collections.abc import Iterator
import functools
import importlib
import math
import random

import grain
import jax
import ml_collections
import numpy as np
import tensorflow_datasets as tfds

from fliqs_jax.data.examples import examples_of
from fliqs_jax.errors import ConfigError, not_among

# Datasets that this package builds itself, on first use.
PACKAGED = {
  'digits': 'fliqs_jax.data.datasets.digits',
  'stdlib_text': 'fliqs_jax.data.datasets.stdlib_text',
}


def find_builder(config: ml_collections.ConfigDict) -> tfds.core.DatasetBuilder:
  """Returns the dataset's builder. Writes nothing.

  Raises:
    ConfigError: where TFDS has no such dataset, it is not prepared in ArrayRecord, or
      its features are not what the config says.
  """
  name, data_dir = config.dataset, config.input.data_dir or None
  if name in PACKAGED:
    importlib.import_module(PACKAGED[name])
  try:
    builder = tfds.builder(name, data_dir=data_dir, file_format='array_record')
  except tfds.core.DatasetNotFoundError:
    raise ConfigError(
      not_among(
        f'unknown dataset {name!r}',
        name,
        [*PACKAGED, *tfds.list_builders()],
        expected=f'one of TFDS or of {", ".join(PACKAGED)}',
      )
    ) from None
  except OSError as error:
    raise ConfigError(_unusable(name, data_dir, error)) from None
  if name not in PACKAGED and not builder.is_prepared():
    raise ConfigError(_unprepared(name, data_dir))
  _check_features(config, builder.info.features)
  return builder


def prepare(config: ml_collections.ConfigDict, builder: tfds.core.DatasetBuilder):
  """Builds a packaged dataset that is not there yet, and checks the splits.

  Raises:
    ConfigError: where a split that the config names does not exist or is empty, or the
      dataset cannot be written.
  """
  if not builder.is_prepared():
    tfds.disable_progress_bar()  # it takes a second
    try:
      builder.download_and_prepare()
    except OSError as error:
      name, folder = config.dataset, builder.data_dir
      raise ConfigError(_unusable(name, folder, error)) from None
  settings, problems = config.input, []
  splits = [settings.train_split, settings.eval_split]
  for split in splits + [settings.reward_split] * bool(settings.reward_split):
    try:
      if not len(builder.as_data_source(split)):
        problems.append(f'split {split!r} of {config.dataset!r} has no examples')
    except ValueError as error:
      problems.append(
        f'split {split!r} of {config.dataset!r}: {str(error).splitlines()[0]}'
      )
  if problems:
    raise ConfigError(*problems)


def _unusable(name, folder, error):
  return (
    f'dataset {name!r} cannot be kept in {str(folder or "the TFDS data folder")!r}: '
    f'{error.strerror or error}; name another folder with --config.input.data_dir=DIR'
  )


def _unprepared(name, data_dir):
  where = f' --data_dir={data_dir}' if data_dir else ''
  return (
    f'dataset {name!r} is not prepared in {data_dir or "the TFDS data folder"}: '
    f'prepare it with `tfds build {name} --file_format=array_record{where}`, name its '
    'folder with --config.input.data_dir=DIR, or use a config that needs nothing, '
    'such as configs/resnet18.py:digits or configs/transformer_lm.py:stdlib'
  )


def _check_features(config, features):
  kind = examples_of(config)
  for name in kind.features:
    if name not in features:
      raise ConfigError(
        f'dataset {config.dataset!r} has no feature {name!r}: a network of images '
        "takes 'image' and 'label', one of text, with input.context, 'text'"
      )
  num_classes = kind.num_classes(features)
  if num_classes != config.num_classes:
    raise ConfigError(
      f'num_classes={config.num_classes}: expected {num_classes}, as dataset '
      f'{config.dataset!r} has'
    )
  if problem := kind.problem(config.input, features):
    raise ConfigError(problem)


def train_batches(
  config: ml_collections.ConfigDict,
  builder: tfds.core.DatasetBuilder,
  seed: int,
  sharding: jax.sharding.Sharding | None = None,
) -> grain.DatasetIterator:
  """Returns the endless iterator over training batches.

  Each is `{'image': uint8[S, B, H, W, C], 'label': int32[S, B]}` in numpy, S samples
  of B examples, or `{'tokens': uint8[S, B, context + 1]}`; with
  `reward.split='validation'` there is also `reward`, the same of held-out examples. The
  batches of all processes together are a function of (seed, step), whatever the number
  of processes.

  Args:
    config: resolved.
    builder: from `find_builder`.
    seed: of order and augmentation.
    sharding: of `[S, B]` over devices; a process loads what its own hold. None loads
      all.
  """
  num_samples = config.search.num_samples if config.mode == 'search' else 1
  shape = (num_samples, config.batch_size // num_samples)
  held = _held_positions(sharding, shape)
  make = functools.partial(_train_dataset, config, builder, held=held)
  dataset = make(split=config.input.train_split, seed=seed)
  if config.mode == 'search' and config.reward.split == 'validation':
    # Held-out examples are not augmented: they stand for the evaluation.
    held_out = make(split=config.input.reward_split, seed=seed + 1, augment=False)
    dataset = grain.experimental.ZipMapDataset([dataset, held_out]).map(
      lambda pair: {**pair[0], 'reward': pair[1]}
    )
  return iter(dataset.to_iter_dataset(_read_options(config)))


def _train_dataset(config, builder, split, seed, held, augment=True):
  kind, settings = examples_of(config), config.input
  source = kind.source(builder, split)
  order = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat()
  positions = held.ravel().tolist()

  def load(step):
    def fill(example, place, out):
      if augment:
        rng = random.Random(f'{seed} {step} {positions[place]}')
        another = lambda: source[rng.randrange(len(source))]
        kind.train(settings, example, rng, another, out)
      else:
        kind.evaluation(settings, example, out)

    first = step * config.batch_size
    indices = [order[first + position] for position in positions]
    batch = _load(source, indices, kind.empty(settings, len(indices)), fill)
    return {
      key: array.reshape(*held.shape, *array.shape[1:]) for key, array in batch.items()
    }

  return grain.MapDataset.range(len(order) // config.batch_size).map(load)


def eval_batches(
  config: ml_collections.ConfigDict,
  builder: tfds.core.DatasetBuilder,
  sharding: jax.sharding.Sharding | None = None,
) -> Iterator[dict[str, np.ndarray]]:
  """Yields every example of the evaluation split once.

  Batches are those of training without the axis of samples, and `mask: bool[B]`, with B
  of `eval_batch_size`; what pads the last one has a False mask.

  Args:
    config: resolved.
    builder: from `find_builder`.
    sharding: of `[B]` over devices; a process loads what its own hold. None loads all.
  """
  kind, settings = examples_of(config), config.input
  source = kind.source(builder, settings.eval_split)
  held = _held_positions(sharding, (config.eval_batch_size,))
  num_batches = -(-len(source) // config.eval_batch_size)

  def load(batch_index):
    indices = batch_index * config.eval_batch_size + held
    # The last example stands in for those that there are not.
    batch = _load(
      source,
      np.minimum(indices, len(source) - 1).tolist(),
      kind.empty(settings, len(indices)),
      lambda example, place, out: kind.evaluation(settings, example, out),
    )
    return {**batch, 'mask': indices < len(source)}

  dataset = grain.MapDataset.range(num_batches).map(load)
  return iter(dataset.to_iter_dataset(_read_options(config)))


def _load(source, indices, batch, fill):
  """Fills a batch with the examples at `indices`, each by `fill(example, place, rows)`.

  Raises:
    ValueError: where one cannot be decoded; says which.
  """
  for place, index in enumerate(indices):
    # Views of one row each, also where a row is one number.
    rows = {name: array[place, ...] for name, array in batch.items()}
    try:
      fill(source[index], place, rows)
    except ValueError as error:
      raise ValueError(f'example {index} of the split: {error}') from None
  return batch


def _held_positions(sharding, shape):
  """Returns the positions in a batch that this process loads, int64[S', B'] or [B']."""
  positions = np.arange(math.prod(shape)).reshape(shape)
  if sharding is None:
    return positions
  held = np.zeros(shape, bool)
  for index in sharding.addressable_devices_indices_map(shape).values():
    held[index] = True
  axes = range(held.ndim)
  return positions[
    np.ix_(*(held.any(axis=tuple(a for a in axes if a != axis)) for axis in axes))
  ]


def _read_options(config):
  # An element is a whole batch here, so few are kept ahead.
  return grain.ReadOptions(
    num_threads=config.input.num_threads,
    prefetch_buffer_size=2 * config.input.num_threads,
  )
