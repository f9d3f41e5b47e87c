"""Kinds of examples, images and texts: how they become the arrays of a batch."""

from collections.abc import Callable, Mapping, Sequence
import functools
import random
from typing import Any, NamedTuple

import ml_collections
import numpy as np
import tensorflow_datasets as tfds

from fliqs_jax.data import augmentations

Arrays = dict[str, np.ndarray]


class Examples(NamedTuple):
  """A kind of examples.

  Attributes:
    features: the names that a dataset's features must have.
    num_classes: (features) -> what `config.num_classes` must be.
    problem: (settings, features) -> what else does not fit, one line; None for nothing.
    source: (builder, split) -> the examples of a split, at random access.
    empty: (settings, B) -> arrays `[B, ...]` of a batch, to be filled.
    train: (settings, example, rng, another, out) writes an example into its rows of
      them, as it is trained on: changed or cut at random, or followed by others, of
      which `another()` returns one.
    evaluation: (settings, example, out) writes it as it is evaluated.
  """

  features: tuple[str, ...]
  num_classes: Callable[[Mapping[str, Any]], int]
  problem: Callable[[ml_collections.ConfigDict, Mapping[str, Any]], str | None]
  source: Callable[[tfds.core.DatasetBuilder, str], Sequence[Any]]
  empty: Callable[[ml_collections.ConfigDict, int], Arrays]
  train: Callable[
    [ml_collections.ConfigDict, Any, random.Random, Callable[[], Any], Arrays], None
  ]
  evaluation: Callable[[ml_collections.ConfigDict, Any, Arrays], None]


def examples_of(config: ml_collections.ConfigDict) -> Examples:
  """Returns the kind of examples that a config's network takes."""
  return IMAGES if config.input.context is None else TEXTS


def _empty_images(settings, size):
  return {
    'image': np.empty((size, *settings.image_shape), np.uint8),
    'label': np.empty(size, np.int32),
  }


def _undecoded(builder, split):
  """Examples as TensorFlow's messages; decoding in TFDS takes longer than reading."""
  method = tfds.decode.DeserializeMethod.DESERIALIZE_NO_DECODE
  return builder.as_data_source(split, deserialize_method=method)


def _image_and_label(example):
  """Returns the file's content and the class."""
  feature = example.features.feature
  return feature['image'].bytes_list.value[0], feature['label'].int64_list.value[0]


def _train_image(settings, example, rng, another, out):
  del another
  encoded, out['label'][...] = _image_and_label(example)
  image = out['image']
  if settings.augmentation == 'none':
    _central_crop(encoded, image)
  else:
    augmentations.random_resized_crop(encoded, rng, image)
    augmentations.random_flip(image, rng)
  if settings.augmentation == 'rand_augment':
    fill = tuple(round(255 * mean) for mean in settings.mean)
    augmentations.rand_augment(image, rng, settings.rand_augment_magnitude, fill)
  augmentations.erase(image, rng, settings.erasing, settings.mean, settings.stddev)


def _evaluation_image(settings, example, out):
  del settings
  encoded, out['label'][...] = _image_and_label(example)
  _central_crop(encoded, out['image'])


def _central_crop(encoded, out):
  augmentations.central_crop(augmentations.decode(encoded, out.shape[-1]), out)


IMAGES = Examples(
  features=('image', 'label'),
  num_classes=lambda features: features['label'].num_classes,
  problem=lambda settings, features: None,
  source=_undecoded,
  empty=_empty_images,
  train=_train_image,
  evaluation=_evaluation_image,
)


class _Kept:
  """A source that keeps the examples that it read last."""

  def __init__(self, source, num_kept):
    self._source = source
    self._read = functools.lru_cache(num_kept)(source.__getitem__)

  def __len__(self):
    return len(self._source)

  def __getitem__(self, index):
    return self._read(index)


def _kept(builder, split):
  """Texts are small, and reading one takes longer than all else."""
  return _Kept(builder.as_data_source(split), num_kept=2**14)


_SEPARATOR = b'\0'  # of texts in a window; as what fills it up, it is not predicted


def _text_problem(settings, features):
  """Says where texts of one length are shorter than a window."""
  for length in features['text'].shape:
    if length is not None and length < settings.context + 1:
      return (
        f'input.context={settings.context}: expected {length - 1} or less, since the '
        f'texts of the dataset have {length} bytes'
      )
  return None


def _empty_tokens(settings, size):
  # Windows, of which each byte is predicted from those before it.
  return {'tokens': np.empty((size, settings.context + 1), np.uint8)}


def _train_window(settings, example, rng, another, out):
  text, size = bytes(example['text']), settings.context + 1
  spare = len(text) - size
  start = rng.randint(0, spare) if spare > 0 else 0
  while settings.packed and len(text) < size:
    text += _SEPARATOR + bytes(another()['text'])
  _window(text, start, out)


def _evaluation_window(settings, example, out):
  del settings
  _window(example['text'], 0, out)


def _window(text, start, out):
  """Writes bytes from `start` on; byte 0 stands for those that a short text lacks."""
  out = out['tokens']
  window = np.frombuffer(text, np.uint8)[start : start + len(out)]
  out[: len(window)] = window
  out[len(window) :] = 0


TEXTS = Examples(
  features=('text',),
  num_classes=lambda features: 256,
  problem=_text_problem,
  source=_kept,
  empty=_empty_tokens,
  train=_train_window,
  evaluation=_evaluation_window,
)
