"""A TFDS dataset of JPEG files made of noise, in the sizes that ImageNet's have.

Colour gradients under noise: as many bytes a pixel as photographs, decoded as they are.
"""

import io

import numpy as np
from PIL import Image
import tensorflow_datasets as tfds

NUM_CLASSES = 10
_SMALLEST, _LARGEST = 64, 2500  # pixels on a side
_GREY_EVERY, _CMYK_EVERY = 50, 75  # ImageNet has both


def random_size(rng: np.random.Generator) -> tuple[int, int]:
  """Returns a width and a height: 400 and 350 on average, with a long tail."""
  width = rng.lognormal(np.log(370), 0.4)
  height = width * rng.lognormal(np.log(0.86), 0.2)
  width, height = np.clip((width, height), _SMALLEST, _LARGEST).astype(int)
  return int(width), int(height)


def random_photograph(
  rng: np.random.Generator, size: tuple[int, int], mode: str = 'RGB'
) -> bytes:
  """Returns a JPEG file.

  Args:
    rng: consumed.
    size: width and height.
    mode: `RGB`, `L` or `CMYK`.
  """
  colours = Image.fromarray(rng.integers(256, size=(6, 8, 3), dtype=np.uint8))
  gradients = np.asarray(colours.resize(size, Image.Resampling.BICUBIC), np.float32)
  noise = rng.normal(0, 14, size=(*gradients.shape[:2], 1))
  image = Image.fromarray(np.clip(gradients + noise, 0, 255).astype(np.uint8))
  file = io.BytesIO()
  image.convert(mode).save(file, 'JPEG', quality=90)
  return file.getvalue()


class Photographs(tfds.core.GeneratorBasedBuilder):
  """Colour, grey-scale and CMYK files; labels are random."""

  VERSION = tfds.core.Version('1.0.0')
  BUILDER_CONFIGS = [
    tfds.core.BuilderConfig(name='small'), tfds.core.BuilderConfig(name='large')
  ]  # fmt: skip

  def _info(self):
    features = {
      'image': tfds.features.Image(encoding_format='jpeg'),
      'label': tfds.features.ClassLabel(num_classes=NUM_CLASSES),
    }
    return tfds.core.DatasetInfo(
      builder=self, features=tfds.features.FeaturesDict(features)
    )

  def _split_generators(self, dl_manager):
    train, test = (150, 25) if self.builder_config.name == 'small' else (1000, 1)
    return {
      'train': self._generate_examples(0, train),
      'test': self._generate_examples(1, test),
    }

  def _generate_examples(self, seed, count):
    rng = np.random.default_rng(seed)
    for index in range(count):
      mode = 'RGB'
      if index % _GREY_EVERY == 1:
        mode = 'L'
      elif index % _CMYK_EVERY == 2:
        mode = 'CMYK'
      photograph = random_photograph(rng, random_size(rng), mode)
      yield (
        index,
        {
          'image': io.BytesIO(photograph),
          'label': int(rng.integers(NUM_CLASSES)),
        },
      )
