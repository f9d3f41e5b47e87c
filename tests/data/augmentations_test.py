"""Crops against PIL, RandAugment's operations against PIL and arithmetic."""

import io
import random

import cv2
import hypothesis
from hypothesis import strategies as st
import numpy as np
from PIL import Image, ImageOps
import pytest
from references import area_means
import tensorflow as tf

from fliqs_jax.data import augmentations

REDUCED = {
  1: 0,
  2: cv2.IMREAD_REDUCED_GRAYSCALE_2,
  4: cv2.IMREAD_REDUCED_GRAYSCALE_4,
  8: cv2.IMREAD_REDUCED_GRAYSCALE_8,
}
SIZES = st.tuples(st.integers(8, 90), st.integers(8, 90))


def noise(height, width, channels=3, seed=0):
  rng = np.random.default_rng(seed)
  return rng.integers(256, size=(height, width, channels), dtype=np.uint8)


def changed(function, image, *args):
  """A copy of an image, changed by a function that works in place."""
  image = image.copy()
  function(image, *args)
  return image


@hypothesis.given(
  size=SIZES, scale=st.floats(0.3, 3), corner=SIZES, channels=st.sampled_from((1, 3))
)
@hypothesis.settings(max_examples=40, deadline=None)
def test_resize(size, scale, corner, channels):
  left, top = corner
  width, height = (max(1, round(scale * side)) for side in size)
  image = noise(top + height + 5, left + width + 5, channels)
  cut = image[top : top + height, left : left + width]
  found = noise(size[1], size[0], channels)
  augmentations.resize(cut, found)
  if all(side > 2 * new for side, new in zip((width, height), size)):
    expected = area_means(cut, size)
  else:
    expected = Image.fromarray(cut.squeeze(2) if channels == 1 else cut).transform(
      size, Image.Transform.EXTENT, (0, 0, width, height), Image.Resampling.BILINEAR
    )
    expected = np.asarray(expected).reshape(size[1], size[0], channels)
  assert np.abs(found.astype(int) - expected).max() <= 1  # rounding


@pytest.mark.parametrize(
  'mode, format', [('RGB', 'PNG'), ('RGB', 'JPEG'), ('CMYK', 'JPEG')]
)
def test_random_crops_are_of_their_area_and_ratio(mode, format, capfd):
  # Every pixel tells its own place, of which the corners of a crop tell the box.
  height, width = 200, 240
  image = np.zeros((height, width, 3), np.uint8)
  image[..., 0] = np.arange(height)[:, None]
  image[..., 1] = np.arange(width)
  file = io.BytesIO()
  Image.fromarray(image).convert(mode).save(file, format, quality=95)
  rng, areas, ratios = random.Random(0), [], []
  out = np.empty((64, 64, 3), np.uint8)
  for _ in range(400):
    augmentations.random_resized_crop(file.getvalue(), rng, out)
    crop = out.astype(float)
    # 64 means over equal parts span 63 of them.
    h = (crop[-1, 0, 0] - crop[0, 0, 0]) * 64 / 63
    w = (crop[0, -1, 1] - crop[0, 0, 1]) * 64 / 63
    areas.append(h * w / (height * width))
    ratios.append(w / h)
  assert 0.07 < min(areas) < 0.12 and 0.85 < max(areas) < 1.02
  assert 0.7 < min(ratios) < 0.8 and 1.25 < max(ratios) < 1.4
  assert abs(np.log(ratios).mean()) < 0.05
  assert not capfd.readouterr().err  # where TensorFlow has its say


@pytest.mark.parametrize('format', ['PNG', 'JPEG'])
def test_where_no_box_fits_the_crop_is_central(format):
  file = io.BytesIO()
  Image.fromarray(noise(4, 400)).save(file, format)
  found, expected = np.empty((2, 8, 8, 3), np.uint8)
  augmentations.random_resized_crop(file.getvalue(), random.Random(0), found)
  augmentations.central_crop(augmentations.decode(file.getvalue(), 3), expected)
  np.testing.assert_array_equal(found, expected)


def test_flips_half_of_the_images():
  image, rng = noise(4, 5), random.Random(0)
  flipped = [changed(augmentations.random_flip, image, rng) for _ in range(400)]
  mirrored = sum(np.array_equal(f, image[:, ::-1]) for f in flipped)
  assert mirrored + sum(np.array_equal(f, image) for f in flipped) == 400
  assert 160 < mirrored < 240  # four deviations of a fair coin


def test_central_crop_keeps_images_of_the_right_size_whole():
  image, whole = noise(20, 30), np.empty((20, 30, 3), np.uint8)
  augmentations.central_crop(image, whole)
  np.testing.assert_array_equal(whole, image)
  image, part = noise(64, 64), np.empty((56, 56, 3), np.uint8)
  augmentations.central_crop(image, part)
  np.testing.assert_array_equal(part, image[4:60, 4:60])


@pytest.mark.parametrize('mode', ['RGB', 'L', 'CMYK'])
@pytest.mark.parametrize('channels', [1, 3])
def test_decodes_as_pil_does(mode, channels):
  image = Image.fromarray(noise(6, 8)).resize((80, 60), Image.Resampling.BICUBIC)
  file = io.BytesIO()
  image.convert(mode).save(file, 'JPEG')
  found = augmentations.decode(file.getvalue(), channels)
  expected = Image.open(file)
  if channels == 1 and mode != 'CMYK':
    expected.draft('L', expected.size)  # the file's own luminance
  expected = expected.convert('L' if channels == 1 else 'RGB')
  expected = np.asarray(expected).reshape(60, 80, channels)
  # The same decoder; what converts CMYK rounds in its own way.
  bound = 2 if mode == 'CMYK' else 0
  assert np.abs(found.astype(int) - expected).max() <= bound


@pytest.mark.parametrize('reduction', [2, 4, 8])
@pytest.mark.parametrize('channels', [1, 3])
def test_reduced_decoding_takes_means(reduction, channels):
  image = Image.fromarray(noise(10, 12)).resize((96, 80), Image.Resampling.BICUBIC)
  file = io.BytesIO()
  image.save(file, 'JPEG', quality=95, subsampling=0)
  box = (0, 0, 96 // reduction, 80 // reduction)
  found = augmentations.decode_box(
    tf.constant(file.getvalue()), channels, box, 96, reduction
  )
  whole = augmentations.decode(file.getvalue(), channels)
  expected = area_means(whole, (96 // reduction, 80 // reduction))
  assert found.shape == expected.shape
  # The decoder's means are of values before they are rounded and clipped.
  assert np.abs(found.astype(int) - expected).mean() < 1


@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.parametrize('reduction', [1, 2, 4, 8])
@pytest.mark.parametrize(
    'mode, options',
    [('RGB', {'subsampling': '4:4:4'}), ('RGB', {'subsampling': '4:2:2'}),
     ('RGB', {'subsampling': '4:2:0'}), ('RGB', {'progressive': True}), ('L', {})],
)  # fmt: skip
def test_decoded_box_is_that_of_the_whole(mode, options, reduction, channels):
  file = io.BytesIO()
  Image.fromarray(noise(83, 101)).convert(mode).save(file, 'JPEG', **options)
  flag = cv2.IMREAD_GRAYSCALE if channels == 1 else cv2.IMREAD_COLOR_RGB
  whole = cv2.imdecode(
    np.frombuffer(file.getvalue(), np.uint8), flag | REDUCED[reduction]
  )
  whole = whole.reshape(*whole.shape[:2], channels)
  encoded = tf.constant(file.getvalue())
  assert augmentations.jpeg_size(encoded) == (101, 83)
  height, width, _ = whole.shape
  rng = np.random.default_rng(0)
  for _ in range(20):
    left, top = rng.integers(width), rng.integers(height)
    w, h = rng.integers(1, width - left + 1), rng.integers(1, height - top + 1)
    found = augmentations.decode_box(
      encoded, channels, (left, top, w, h), 101, reduction
    )
    np.testing.assert_array_equal(found, whole[top : top + h, left : left + w])


def jpeg_without_its_end():
  file = io.BytesIO()
  Image.fromarray(noise(60, 80)).save(file, 'JPEG')
  return file.getvalue()[: len(file.getvalue()) // 2]


@pytest.mark.parametrize('file', [b'no image', b'', jpeg_without_its_end()])
@pytest.mark.parametrize(
  'read',
  [
    lambda file: augmentations.decode(file, 3),
    lambda file: augmentations.decode_box(tf.constant(file), 3, (0, 40, 8, 8), 80),
    lambda file: augmentations.random_resized_crop(
      file, random.Random(0), np.empty((8, 8, 3), np.uint8)
    ),
  ],
)
def test_broken_file(read, file):
  with pytest.raises(ValueError, match='expected a JPEG or a PNG file'):
    read(file)


def apply(name, image, level, sign=1):
  fill = (10, 20, 30)[: image.shape[2]]
  pil = Image.fromarray(image.squeeze())
  result = augmentations.OPERATIONS[name](pil, level, sign, fill)
  return np.asarray(result).reshape(image.shape)


def blend(image, other, factor):
  return other + factor * (image.astype(float) - other)


# What each operation does to `noise(12, 10)` at level 0.8, by its published range.
def expected_of(name, sign):
  image = noise(12, 10)
  pil, wide = Image.fromarray(image), image.astype(float)
  grey = np.asarray(pil.convert('L'))[..., None]
  factor = 1 + sign * 0.9 * 0.8
  return {
    'invert': 255 - wide,
    'posterize': image & 0b10000000,  # 4 − int(0.8 · 4) = 1 bit
    'solarize': np.where(image < 256 - 204, image, 255 - wide),  # int(0.8 · 256) = 204
    'solarize_add': np.where(image < 128, np.minimum(wide + 88, 255), wide),
    'equalize': np.asarray(ImageOps.equalize(pil)),
    'auto_contrast': np.asarray(ImageOps.autocontrast(pil)),
    'brightness': blend(image, 0, factor),
    'contrast': blend(image, round(grey.mean()), factor),
    'color': blend(image, grey, factor),
  }[name]


@pytest.mark.parametrize('sign', [-1, 1])
@pytest.mark.parametrize(
    'name', ['invert', 'posterize', 'solarize', 'solarize_add', 'equalize',
             'auto_contrast', 'brightness', 'contrast', 'color'],
)  # fmt: skip
def test_operation_on_colours(name, sign):
  expected = np.clip(expected_of(name, sign), 0, 255)
  found = apply(name, noise(12, 10), 0.8, sign)
  assert np.abs(found - expected).max() <= 1  # rounding


@pytest.mark.parametrize('axis', [0, 1])
@pytest.mark.parametrize('sign', [-1, 1])
def test_translation_moves_by_its_part_and_fills(axis, sign):
  image = noise(20, 20)
  found = apply('translate_x' if axis else 'translate_y', image, 1.0, sign)
  moved = np.roll(image, -9 * sign, axis)  # 0.45 · 20
  gap = np.s_[-9:] if sign > 0 else np.s_[:9]
  moved[(slice(None), gap) if axis else gap] = (10, 20, 30)
  np.testing.assert_array_equal(found, moved)


@pytest.mark.parametrize('sign', [-1, 1])
def test_shear_and_rotation_move_a_point_as_geometry_says(sign):
  # The centre of mass of a dot, before and after; 0.3 and 30° at the highest level.
  image = np.zeros((81, 81, 1), np.uint8)
  image[57:60, 47:50] = 200
  ys, xs = np.mgrid[:81, :81] + 0.5

  def centre(array):
    mass = array[..., 0] * (np.abs(array[..., 0] - 10.0) > 5)  # less the fill
    return np.array([(mass * xs).sum(), (mass * ys).sum()]) / mass.sum()

  x, y = centre(image)
  angle = np.deg2rad(30 * sign)
  turned = 40.5 + np.array([
      np.cos(angle) * (x - 40.5) + np.sin(angle) * (y - 40.5),
      -np.sin(angle) * (x - 40.5) + np.cos(angle) * (y - 40.5),
  ])  # counter-clockwise, with y downwards  # fmt: skip
  for name, expected in (
    ('shear_x', (x - 0.3 * sign * y, y)),
    ('shear_y', (x, y - 0.3 * sign * x)),
    ('rotate', turned),
  ):
    np.testing.assert_allclose(
      centre(apply(name, image, 1.0, sign)), expected, atol=0.2
    )


def test_sharpness_is_away_from_the_smoothed_image():
  image = noise(9, 9)
  sharp, blurred = (
    apply('sharpness', image, 1.0, sign).astype(int) for sign in (1, -1)
  )
  inner = np.s_[1:-1, 1:-1]  # PIL does not smooth the edge
  kernel = np.ones((3, 3)) / 13
  kernel[1, 1] = 5 / 13
  smooth = sum(
    kernel[i, j] * image[i : i + 7, j : j + 7].astype(float)
    for i in range(3)
    for j in range(3)
  )
  for found, factor in ((sharp, 1.9), (blurred, 0.1)):
    expected = np.clip(blend(image[inner], smooth, factor), 0, 255)
    assert np.abs(found[inner] - expected).max() <= 2  # PIL rounds the smooth image too


@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.parametrize('name', augmentations.OPERATIONS)
def test_operation_grows_from_nothing(name, channels):
  image = noise(16, 16, channels)
  for sign in (-1, 1):
    weak, strong = (apply(name, image, level, sign) for level in (0.0, 1.0))
    assert weak.shape == strong.shape == image.shape
    if name not in ('auto_contrast', 'equalize', 'invert', 'posterize'):
      np.testing.assert_array_equal(weak, image)
    if name == 'posterize':
      np.testing.assert_array_equal(weak, image & 0b11110000)
    if (name, channels) != ('color', 1):
      assert not np.array_equal(strong, image) or name == 'auto_contrast'


def test_rand_augment_applies_half_of_two_operations():
  image = noise(16, 16)
  rng = random.Random(0)
  results = [
    changed(augmentations.rand_augment, image, rng, 9.0, (0, 0, 0)) for _ in range(800)
  ]
  unchanged = np.mean([np.array_equal(result, image) for result in results])
  # Neither of the two is done, or they are auto-contrast, which noise leaves alone.
  expected = (0.5 + 0.5 / len(augmentations.OPERATIONS)) ** 2
  assert abs(unchanged - expected) < 4 * np.sqrt(expected * (1 - expected) / 800)


@hypothesis.given(seed=st.integers(0, 10_000))
@hypothesis.settings(max_examples=60, deadline=None)
def test_erasing_puts_noise_into_one_box(seed):
  image = np.full((60, 80, 3), 7, np.uint8)
  mean, stddev = (0.8, 0.5, 0.5), (0.1, 0.2, 0.2)
  rng = random.Random(seed)
  found = changed(augmentations.erase, image, rng, 1.0, mean, stddev)
  rows, columns = (np.flatnonzero((found[..., 0] != 7).any(axis=a)) for a in (1, 0))
  h, w = len(rows), len(columns)
  assert rows[-1] - rows[0] == h - 1 and columns[-1] - columns[0] == w - 1
  assert 0.015 < h * w / (60 * 80) < 0.35 and 0.27 < w / h < 3.7
  box = found[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] / 255
  np.testing.assert_allclose(box[..., 0].mean(), 0.8, atol=5 * 0.1 / np.sqrt(h * w))
  np.testing.assert_allclose(box[..., 1].mean(), 0.5, atol=5 * 0.2 / np.sqrt(h * w))


def test_erasing_happens_as_often_as_it_should():
  image, rng = np.full((30, 30, 1), 7, np.uint8), random.Random(0)
  erased = [
    (changed(augmentations.erase, image, rng, 0.25, (0.5,), (0.2,)) != 7).any()
    for _ in range(600)
  ]
  assert abs(np.mean(erased) - 0.25) < 4 * np.sqrt(0.25 * 0.75 / 600)
