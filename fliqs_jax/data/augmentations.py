"""Augmentations of one image, `uint8[H, W, C]`, for training and evaluation.

An image's place in its batch is filled and then changed there: new memory takes longer
to get than pixels to write. Random numbers are Python's own: making a generator for
each image, and drawing single numbers, takes numpy several times as long.
"""

import math
import random

import cv2
import numpy as np
from PIL import Image, ImageEnhance, ImageOps
import tensorflow as tf

cv2.setNumThreads(0)  # what runs in parallel is images

_REDUCTIONS = (1, 2, 4, 8)  # of both sides, that JPEG files are decoded with
_JPEG_START = b'\xff\xd8'
_NO_IMAGE = 'an image cannot be decoded: expected a JPEG or a PNG file'

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


def decode(encoded: bytes, num_channels: int) -> np.ndarray:
  """Returns the pixels of a JPEG or PNG file, in RGB or, of one channel, in grey.

  Args:
    encoded: the file's content.
    num_channels: 1 or 3.

  Raises:
    ValueError: where there is no image in it.
  """
  colour = cv2.IMREAD_GRAYSCALE if num_channels == 1 else cv2.IMREAD_COLOR_RGB
  flags = colour | cv2.IMREAD_IGNORE_ORIENTATION
  # OpenCV has an error of its own for no bytes.
  image = cv2.imdecode(np.frombuffer(encoded, np.uint8), flags) if encoded else None
  if image is None:
    raise ValueError(_NO_IMAGE)
  return image.reshape(*image.shape[:2], num_channels)


def jpeg_size(encoded: tf.Tensor) -> tuple[int, int] | None:
  """Returns the width and the height of a JPEG that `decode_box` reads, else None.

  Args:
    encoded: the file's content, a scalar string.
  """
  try:
    height, width, components = tf.io.extract_jpeg_shape(encoded).numpy().tolist()
  except tf.errors.InvalidArgumentError:
    return None
  return None if components == 4 else (width, height)  # CMYK: TensorFlow refuses it


def decode_box(
  encoded: tf.Tensor,
  num_channels: int,
  box: tuple[int, int, int, int],
  image_width: int,
  reduction: int = 1,
) -> np.ndarray:
  """Returns the pixels in a box `(left, top, width, height)`, as `decode` has them.

  No others are computed, and what follows the box is not read.

  Args:
    encoded: the content of a JPEG file, a scalar string.
    num_channels: 1 or 3.
    box: in pixels of the reduced image.
    image_width: of `jpeg_size`.
    reduction: 1, 2, 4 or 8, of both sides. The file is decoded at the lower resolution,
      each pixel the mean of those that it stands for.

  Raises:
    ValueError: where there is no image in it.
  """
  left, top, width, height = box
  # With a column on each side, from which subsampled colours are interpolated.
  first, end = max(left - 1, 0), min(left + width + 1, -(-image_width // reduction))
  try:
    image = tf.io.decode_and_crop_jpeg(
      encoded,
      np.array((top, first, height, end - first), np.int32),
      channels=num_channels,
      ratio=reduction,
      acceptable_fraction=1.0,  # an integer, as its default, takes a slow path
      dct_method='INTEGER_ACCURATE',  # as OpenCV and PIL decode
    )
  except tf.errors.InvalidArgumentError:
    raise ValueError(_NO_IMAGE) from None
  return np.asarray(image)[:, left - first : left - first + width]


def random_resized_crop(encoded: bytes, rng: random.Random, out: np.ndarray) -> None:
  """Fills `out` with a crop of random area and aspect ratio; where none fits, with the
  central one.

  What is at least twice as large as it will be is decoded at a lower resolution, since
  decoding is what takes the time.

  Args:
    encoded: the content of a JPEG or PNG file.
    rng: consumed.
    out: `uint8[H, W, C]`.

  Raises:
    ValueError: where there is no image in it.
  """
  height, width, num_channels = out.shape
  contents = tf.constant(encoded)
  # TensorFlow prints a line for each file that is something else.
  size = jpeg_size(contents) if encoded.startswith(_JPEG_START) else None
  if size is None:
    image = decode(encoded, num_channels)
    left, top, w, h = _random_box(image.shape[1::-1], out, rng)
    resize(image[top : top + h, left : left + w], out)
    return
  box = _random_box(size, out, rng)
  times = min(box[2] // width, box[3] // height)
  reduction = max(r for r in _REDUCTIONS if r <= max(times, 1))
  box = tuple(side // reduction for side in box)
  resize(decode_box(contents, num_channels, box, size[0], reduction), out)


def _random_box(image_size, out, rng):
  width, height = image_size
  for _ in range(10):
    w, h = _random_sides(width * height, _CROP_AREA, _CROP_RATIO, rng)
    if 0 < w <= width and 0 < h <= height:
      return rng.randrange(width - w + 1), rng.randrange(height - h + 1), w, h
  return _central_box(image_size, out)


def _central_box(image_size, out):
  width, height = image_size
  scale = min(height / out.shape[0], width / out.shape[1]) * _CENTRAL_CROP
  h, w = (max(1, round(scale * side)) for side in out.shape[:2])
  return (width - w) // 2, (height - h) // 2, w, h


def central_crop(image: np.ndarray, out: np.ndarray) -> None:
  """Fills `out` with the central part, resized; images of its size stay whole."""
  if image.shape == out.shape:
    out[:] = image
    return
  left, top, w, h = _central_box(image.shape[1::-1], out)
  resize(image[top : top + h, left : left + w], out)


def resize(image: np.ndarray, out: np.ndarray) -> None:
  """Fills `out` with the image at its size.

  Bilinear interpolation reads 2×2 pixels. From more than twice the size it would skip
  some, so there each pixel is the mean of the area that it covers.
  """
  height, width, _ = out.shape
  skips = image.shape[0] > 2 * height and image.shape[1] > 2 * width
  cv2.resize(
    image,
    (width, height),
    dst=out,
    interpolation=cv2.INTER_AREA if skips else cv2.INTER_LINEAR,
  )


def random_flip(image: np.ndarray, rng: random.Random) -> None:
  """Makes it its mirror image, left to right, half of the times."""
  if rng.random() >= 0.5:
    cv2.flip(image, 1, dst=image)


def _random_sides(area, part, ratio, rng):
  """Returns the integer sides of a box with a random part of an area."""
  area *= rng.uniform(*part)
  ratio = math.exp(rng.uniform(*map(math.log, ratio)))
  return round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))


def rand_augment(
  image: np.ndarray, rng: random.Random, magnitude: float, fill: tuple[int, ...]
) -> None:
  """RandAugment (Cubuk et al., 2020, arXiv 1909.13719), in the form of DeiT.

  Args:
    image: changed in place.
    rng: consumed.
    magnitude: the mean level of the operations, 0 … `MAX_LEVEL`.
    fill: per channel, of what moves into the image.
  """
  operations = list(OPERATIONS.values())
  changed = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
  for _ in range(_NUM_OPERATIONS):
    operation, sign = rng.choice(operations), rng.choice((-1, 1))
    level = min(max(rng.gauss(magnitude, _LEVEL_STDDEV), 0), MAX_LEVEL) / MAX_LEVEL
    if rng.random() < _PROBABILITY:
      changed = operation(changed, level, sign, fill)
  image[:] = np.asarray(changed).reshape(image.shape)


def _posterize(image, level, sign, fill):
  return ImageOps.posterize(image, max(1, 4 - int(4 * level)))


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


# `(image, level in [0, 1], sign, fill) -> image` of PIL, stronger with the level.
OPERATIONS = {
  'auto_contrast': lambda image, *_: ImageOps.autocontrast(image),
  'equalize': lambda image, *_: ImageOps.equalize(image),
  'invert': lambda image, *_: ImageOps.invert(image),
  'rotate': _rotate,
  'posterize': _posterize,
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
  image: np.ndarray,
  rng: random.Random,
  probability: float,
  mean: tuple[float, ...],
  stddev: tuple[float, ...],
) -> None:
  """Random erasing (Zhong et al., 2020, arXiv 1708.04896), with noise in every pixel.

  Args:
    image: changed in place.
    rng: consumed.
    probability: of there being a box of noise.
    mean: per channel, of the normal noise, whose values are pixels in [0, 1].
    stddev: per channel.
  """
  if rng.random() >= probability:
    return
  height, width, channels = image.shape
  for _ in range(10):
    w, h = _random_sides(width * height, _ERASED_AREA, _ERASED_RATIO, rng)
    if 0 < w < width and 0 < h < height:
      top, left = rng.randrange(height - h + 1), rng.randrange(width - w + 1)
      noise = np.random.default_rng(rng.getrandbits(64))
      noise = noise.normal(mean, stddev, size=(h, w, channels))
      image[top : top + h, left : left + w] = np.clip(np.rint(255 * noise), 0, 255)
      break
