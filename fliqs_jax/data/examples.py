"""Kinds of examples, images and texts: how they become the arrays of a batch."""

from collections.abc import Callable, Mapping
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
    decoders: of TFDS, for what `train` and `evaluation` decode themselves.
    num_kept: how many are kept in memory as they were read.
    empty: (settings, B) -> arrays `[B, ...]` of a batch, to be filled.
    train: (settings, example, rng, out) writes an example into its rows of them, as it
      is trained on: changed or cut at random.
    evaluation: (settings, example, out) writes it as it is evaluated.
  """

  features: tuple[str, ...]
  num_classes: Callable[[Mapping[str, Any]], int]
  problem: Callable[[ml_collections.ConfigDict, Mapping[str, Any]], str | None]
  decoders: Mapping[str, Any]
  num_kept: int
  empty: Callable[[ml_collections.ConfigDict, int], Arrays]
  train: Callable[[ml_collections.ConfigDict, Any, random.Random, Arrays], None]
  evaluation: Callable[[ml_collections.ConfigDict, Any, Arrays], None]


def examples_of(config: ml_collections.ConfigDict) -> Examples:
  """Returns the kind of examples that a config's network takes."""
  return IMAGES if config.input.context is None else TEXTS


def _empty_images(settings, size):
  return {
    'image': np.empty((size, *settings.image_shape), np.uint8),
    'label': np.empty(size, np.int32),
  }


def _train_image(settings, example, rng, out):
  image, out['label'][...] = out['image'], example['label']
  if settings.augmentation == 'none':
    _central_crop(example['image'], image)
  else:
    augmentations.random_resized_crop(example['image'], rng, image)
    augmentations.random_flip(image, rng)
  if settings.augmentation == 'rand_augment':
    fill = tuple(round(255 * mean) for mean in settings.mean)
    augmentations.rand_augment(image, rng, settings.rand_augment_magnitude, fill)
  augmentations.erase(image, rng, settings.erasing, settings.mean, settings.stddev)


def _evaluation_image(settings, example, out):
  del settings
  out['label'][...] = example['label']
  _central_crop(example['image'], out['image'])


def _central_crop(encoded, out):
  augmentations.central_crop(augmentations.decode(encoded, out.shape[-1]), out)


IMAGES = Examples(
  features=('image', 'label'),
  num_classes=lambda features: features['label'].num_classes,
  problem=lambda settings, features: None,
  # Decoding belongs to the workers that crop and resize.
  decoders={'image': tfds.decode.SkipDecoding()},
  num_kept=0,
  empty=_empty_images,
  train=_train_image,
  evaluation=_evaluation_image,
)


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


def _train_window(settings, example, rng, out):
  spare = len(example['text']) - settings.context - 1
  _window(example['text'], rng.randint(0, spare) if spare > 0 else 0, out)


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
  decoders={},
  num_kept=2**14,  # reading takes longer than all else, and they are small
  empty=_empty_tokens,
  train=_train_window,
  evaluation=_evaluation_window,
)
