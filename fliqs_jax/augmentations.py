"""What training and evaluation do to one image, with PIL and NumPy.

Images are PIL's, `L` or `RGB`; sizes are `(width, height)`, as PIL has them.
"""

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

# The part of the image's area and the aspect ratios of a random resized crop
# (Szegedy et al., 2015), and what of the image evaluation sees.
_CROP_AREA, _CROP_RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
_CENTRAL_CROP = 0.875

# RandAugment as DeiT has it, `rand-m9-mstd0.5-inc1` of timm: two operations of a table,
# each done with this probability and at a level that varies by this much.
_NUM_OPERATIONS, _PROBABILITY, _LEVEL_STDDEV = 2, 0.5, 0.5
MAX_LEVEL = 10

# The part of the image's area and the aspect ratios of an erased box.
_ERASED_AREA, _ERASED_RATIO = (0.02, 1 / 3), (0.3, 1 / 0.3)


def random_resized_crop(
  image: Image.Image, size: tuple[int, int], rng: np.random.Generator
) -> Image.Image:
  """A crop of random area and aspect ratio, resized; the largest where none fits."""
  width, height = image.size
  for _ in range(10):
    w, h = _random_sides(width * height, _CROP_AREA, _CROP_RATIO, rng)
    if 0 < w <= width and 0 < h <= height:
      left, top = rng.integers(width - w + 1), rng.integers(height - h + 1)
      return _resize(image, size, (left, top, left + w, top + h))
  return central_crop(image, size)


def random_flip(image: Image.Image, rng: np.random.Generator) -> Image.Image:
  """The image, or its mirror image, left to right."""
  if rng.random() < 0.5:
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
  return image


def central_crop(image: Image.Image, size: tuple[int, int]) -> Image.Image:
  """The central part of an image, resized; images of the right size stay whole."""
  if image.size == size:
    return image
  side = min(image.size[0] / size[0], image.size[1] / size[1]) * _CENTRAL_CROP
  w, h = side * size[0], side * size[1]
  left, top = (image.size[0] - w) / 2, (image.size[1] - h) / 2
  return _resize(image, size, (left, top, left + w, top + h))


def _resize(image, size, box):
  return image.resize(size, Image.Resampling.BILINEAR, box=box)


def _random_sides(area, part, ratio, rng):
  """Returns the integer sides of a box with a random part of an area."""
  area *= rng.uniform(*part)
  ratio = np.exp(rng.uniform(*np.log(ratio)))
  return round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))


def rand_augment(
  image: Image.Image,
  rng: np.random.Generator,
  magnitude: float,
  fill: tuple[int, ...],
) -> Image.Image:
  """RandAugment (Cubuk et al., 2020, arXiv 1909.13719), in the form of DeiT.

  Args:
    image: not changed.
    rng: consumed.
    magnitude: the mean level of the operations, 0 … `MAX_LEVEL`.
    fill: per channel, of what moves into the image.
  """
  names = list(OPERATIONS)
  for _ in range(_NUM_OPERATIONS):
    operation = OPERATIONS[names[rng.integers(len(names))]]
    level = np.clip(rng.normal(magnitude, _LEVEL_STDDEV), 0, MAX_LEVEL) / MAX_LEVEL
    sign = rng.choice((-1, 1))
    if rng.random() < _PROBABILITY:
      image = operation(image, float(level), int(sign), fill)
  return image


def _solarize_add(image, level, sign, fill):
  added = [min(255, i + int(110 * level)) if i < 128 else i for i in range(256)]
  return image.point(added * len(image.getbands()))


def _enhance(kind):
  return lambda image, level, sign, fill: kind(image).enhance(1 + 0.9 * sign * level)


def _affine(coefficients):
  """An operation that reads pixel (x, y) at (a·x + b·y + c, d·x + e·y + f)."""

  def operation(image, level, sign, fill):
    return image.transform(
      image.size,
      Image.Transform.AFFINE,
      coefficients(sign * level, *image.size),
      Image.Resampling.BILINEAR,
      fillcolor=fill,
    )

  return operation


def _rotate(image, level, sign, fill):
  return image.rotate(30 * sign * level, Image.Resampling.BILINEAR, fillcolor=fill)


# `(image, level in [0, 1], sign, fill) -> image`; all grow stronger with the level.
OPERATIONS = {
  'auto_contrast': lambda image, *_: ImageOps.autocontrast(image),
  'equalize': lambda image, *_: ImageOps.equalize(image),
  'invert': lambda image, *_: ImageOps.invert(image),
  'rotate': _rotate,
  'posterize': lambda image, level, *_: ImageOps.posterize(image, 4 - int(4 * level)),
  'solarize': lambda image, level, *_: ImageOps.solarize(image, 256 - int(256 * level)),
  'solarize_add': _solarize_add,
  'color': _enhance(ImageEnhance.Color),
  'contrast': _enhance(ImageEnhance.Contrast),
  'brightness': _enhance(ImageEnhance.Brightness),
  'sharpness': _enhance(ImageEnhance.Sharpness),
  'shear_x': _affine(lambda part, w, h: (1, 0.3 * part, 0, 0, 1, 0)),
  'shear_y': _affine(lambda part, w, h: (1, 0, 0, 0.3 * part, 1, 0)),
  'translate_x': _affine(lambda part, w, h: (1, 0, 0.45 * part * w, 0, 1, 0)),
  'translate_y': _affine(lambda part, w, h: (1, 0, 0, 0, 1, 0.45 * part * h)),
}


def erase(
  pixels: np.ndarray,
  rng: np.random.Generator,
  probability: float,
  mean: tuple[float, ...],
  stddev: tuple[float, ...],
) -> np.ndarray:
  """Random erasing (Zhong et al., 2020, arXiv 1708.04896), with noise in every pixel.

  Args:
    pixels: `uint8[H, W, C]`, not changed.
    rng: consumed.
    probability: of there being a box of noise.
    mean: per channel, of the normal noise, whose values are pixels in [0, 1].
    stddev: per channel.
  """
  if rng.random() >= probability:
    return pixels
  height, width, channels = pixels.shape
  for _ in range(10):
    w, h = _random_sides(width * height, _ERASED_AREA, _ERASED_RATIO, rng)
    if 0 < w < width and 0 < h < height:
      top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
      noise = rng.normal(mean, stddev, size=(h, w, channels))
      pixels = pixels.copy()
      pixels[top : top + h, left : left + w] = np.clip(np.rint(255 * noise), 0, 255)
      break
  return pixels
