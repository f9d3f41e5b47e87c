"""Batches from TFDS datasets, read at random access through Grain.

Everything is a function of (seed, step): the order of examples, their augmentation,
and so the state of an iterator, which is a few bytes in a checkpoint.
"""

from collections.abc import Iterator
import functools
import importlib
import io
import math

import grain
import jax
import ml_collections
import numpy as np
from PIL import Image
import tensorflow_datasets as tfds

from fliqs_jax.names import not_among

# Datasets that this package builds itself, on first use.
PACKAGED = {'digits': 'fliqs_jax.datasets.digits'}

# The part of the image's area and the aspect ratios of a random resized crop
# (Szegedy et al., 2015), and what of the image evaluation sees.
_CROP_AREA, _CROP_RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
_CENTRAL_CROP = 0.875


def find_builder(config: ml_collections.ConfigDict) -> tfds.core.DatasetBuilder:
  """Returns the dataset's builder. Writes nothing.

  Raises:
    ValueError: where TFDS has no such dataset, it is not prepared in ArrayRecord, or
      its features are not what the config says.
  """
  name, data_dir = config.dataset, config.input.data_dir or None
  if name in PACKAGED:
    importlib.import_module(PACKAGED[name])
  try:
    builder = tfds.builder(name, data_dir=data_dir, file_format='array_record')
  except tfds.core.DatasetNotFoundError:
    raise ValueError(
      not_among(
        f'unknown dataset {name!r}',
        name,
        [*PACKAGED, *tfds.list_builders()],
        expected=f'one of TFDS or of {", ".join(PACKAGED)}',
      )
    ) from None
  if name not in PACKAGED and not builder.is_prepared():
    raise ValueError(_unprepared(name, data_dir))
  _check_features(config, builder.info.features)
  return builder


def prepare(config: ml_collections.ConfigDict, builder: tfds.core.DatasetBuilder):
  """Builds a packaged dataset that is not there yet, and checks the splits.

  Raises:
    ValueError: where a split that the config names does not exist or is empty.
  """
  if not builder.is_prepared():
    tfds.disable_progress_bar()  # it takes a second
    builder.download_and_prepare()
  settings, problems = config.input, []
  for split in (settings.train_split, settings.eval_split, settings.reward_split):
    try:
      if split and not len(_source(builder, split)):
        problems.append(f'split {split!r} of {config.dataset!r} has no examples')
    except ValueError as error:
      problems.append(
        f'split {split!r} of {config.dataset!r}: {str(error).splitlines()[0]}'
      )
  if problems:
    raise ValueError('\n'.join(problems))


def _unprepared(name, data_dir):
  where = f' --data_dir={data_dir}' if data_dir else ''
  return (
    f'dataset {name!r} is not prepared in {data_dir or "the TFDS data folder"}: '
    f'prepare it with `tfds build {name} --file_format=array_record{where}`, name its '
    "folder with --config.input.data_dir=DIR, or use a config's `:digits` variant, "
    'which needs nothing'
  )


def _check_features(config, features):
  for name in ('image', 'label'):
    if name not in features:
      raise ValueError(f'dataset {config.dataset!r} has no feature {name!r}')
  num_classes = features['label'].num_classes
  if num_classes != config.num_classes:
    raise ValueError(
      f'num_classes={config.num_classes}: expected {num_classes}, as dataset '
      f'{config.dataset!r} has'
    )


def train_batches(
  config: ml_collections.ConfigDict,
  builder: tfds.core.DatasetBuilder,
  seed: int,
  sharding: jax.sharding.Sharding | None = None,
) -> grain.DatasetIterator:
  """Returns the endless iterator over training batches.

  Each is `{'image': float32[S, B, H, W, C], 'label': int32[S, B]}` in numpy, S samples
  of B examples; with `reward.split='validation'` there is also `reward`, the same of
  held-out examples. The batches of all processes together are a function of (seed,
  step), whatever the number of processes.

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
    held_out = make(split=config.input.reward_split, seed=seed + 1, augment='none')
    dataset = grain.experimental.ZipMapDataset([dataset, held_out]).map(
      lambda pair: {**pair[0], 'reward': pair[1]}
    )
  return iter(dataset.to_iter_dataset(_read_options(config)))


def _train_dataset(config, builder, split, seed, held, augment=None):
  preprocess = functools.partial(
    _train_example, config.input, augment or config.input.augmentation
  )
  return (
    grain.MapDataset.source(_source(builder, split))
    .seed(seed)
    .shuffle()
    .repeat()
    .random_map(preprocess)
    .pipe(_Positions, config.batch_size, held.ravel())
    .batch(held.size)
    .map(functools.partial(_split_samples, num_samples=held.shape[0]))
  )


def eval_batches(
  config: ml_collections.ConfigDict,
  builder: tfds.core.DatasetBuilder,
  sharding: jax.sharding.Sharding | None = None,
) -> Iterator[dict[str, np.ndarray]]:
  """Yields every example of the evaluation split once.

  Batches are `{'image': float32[B, ...], 'label': int32[B], 'mask': bool[B]}` with B of
  `eval_batch_size`; what pads the last one has a False mask.

  Args:
    config: resolved.
    builder: from `find_builder`.
    sharding: of `[B]` over devices; a process loads what its own hold. None loads all.
  """
  source = _source(builder, config.input.eval_split)
  held = _held_positions(sharding, (config.eval_batch_size,))
  num_batches = -(-len(source) // config.eval_batch_size)
  dataset = (
    grain.MapDataset.range(num_batches * config.eval_batch_size)
    .pipe(_Positions, config.eval_batch_size, held)
    .map(functools.partial(_padded_example, config.input, source))
    .batch(held.size)
  )
  return iter(dataset.to_iter_dataset(_read_options(config)))


def _padded_example(settings, source, index):
  example = source[min(int(index), len(source) - 1)]
  return {**_eval_example(settings, example), 'mask': index < len(source)}


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


class _Positions(grain.MapDataset):
  """Of every `batch_size` elements those at some positions, in their order."""

  def __init__(self, parent, batch_size, positions):
    super().__init__(parent)
    self._batch_size, self._positions = batch_size, positions.tolist()

  def __len__(self):
    return len(self._parent) // self._batch_size * len(self._positions)

  def __getitem__(self, index):
    if isinstance(index, slice):
      return self.slice(index)
    batch, position = divmod(index, len(self._positions))
    return self._parent[batch * self._batch_size + self._positions[position]]


def _source(builder, split):
  # Encoded images: decoding belongs to the workers that crop and resize.
  return builder.as_data_source(split, decoders={'image': tfds.decode.SkipDecoding()})


def _read_options(config):
  # An element is a whole batch here, so few are kept ahead.
  return grain.ReadOptions(
    num_threads=config.input.num_threads,
    prefetch_buffer_size=2 * config.input.num_threads,
  )


def _split_samples(batch, num_samples):
  return {
    key: array.reshape(num_samples, -1, *array.shape[1:])
    for key, array in batch.items()
  }


def _train_example(settings, augmentation, example, rng):
  image = _decode(example['image'], settings)
  if augmentation == 'crop_flip':
    image = _random_resized_crop(image, settings, rng)
    if rng.random() < 0.5:
      image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
  else:
    image = _central_crop(image, settings)
  return _to_arrays(image, example['label'], settings)


def _eval_example(settings, example):
  image = _central_crop(_decode(example['image'], settings), settings)
  return _to_arrays(image, example['label'], settings)


def _decode(encoded, settings):
  image = Image.open(io.BytesIO(encoded))
  return image.convert('L' if settings.image_shape[-1] == 1 else 'RGB')


def _random_resized_crop(image, settings, rng):
  """A crop of random area and aspect ratio, resized; the largest where none fits."""
  width, height = image.size
  for _ in range(10):
    area = width * height * rng.uniform(*_CROP_AREA)
    ratio = np.exp(rng.uniform(*np.log(_CROP_RATIO)))
    w, h = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
    if 0 < w <= width and 0 < h <= height:
      left, top = rng.integers(width - w + 1), rng.integers(height - h + 1)
      return _resize(image, settings, (left, top, left + w, top + h))
  return _central_crop(image, settings)


def _central_crop(image, settings):
  """The central part of an image, resized; images of the right size stay whole."""
  height, width, _ = settings.image_shape
  if image.size == (width, height):
    return image
  side = min(image.size[0] / width, image.size[1] / height) * _CENTRAL_CROP
  w, h = side * width, side * height
  left, top = (image.size[0] - w) / 2, (image.size[1] - h) / 2
  return _resize(image, settings, (left, top, left + w, top + h))


def _resize(image, settings, box):
  height, width, _ = settings.image_shape
  return image.resize((width, height), Image.Resampling.BILINEAR, box=box)


def _to_arrays(image, label, settings):
  pixels = np.asarray(image, np.float32).reshape(settings.image_shape)
  return {
    'image': (pixels / 255 - np.float32(settings.mean)) / np.float32(settings.stddev),
    'label': np.int32(label),
  }
