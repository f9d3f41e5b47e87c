"""Normalization and mixing against arithmetic on the pixels."""

import hypothesis
from hypothesis import strategies as st
import jax
import numpy as np
import pytest

from fliqs_jax.training import preprocessing

CLASSES, SHAPE = 5, (6, 12, 10, 3)


def test_normalize_rounds_as_numpy_does():
  pixels = np.arange(256, dtype=np.uint8)[:, None].repeat(3, axis=1)
  half = (0.5,) * 3
  expected = (pixels.astype(np.float32) / np.float32(255) - np.float32(0.5)) * 2
  found = jax.jit(lambda x: preprocessing.normalize(x, half, half))(pixels)
  np.testing.assert_array_equal(found, expected)
  mean, stddev = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
  for images in (pixels, pixels.astype(np.float32)):
    found = preprocessing.normalize(images, mean, stddev)
    np.testing.assert_allclose(found, (pixels / 255 - mean) / stddev, atol=1e-6)


@jax.jit
def mix(batch, seed, mixup_alpha, cutmix_alpha):
  key = jax.random.key(seed)
  return preprocessing.mix(batch, key, CLASSES, mixup_alpha, cutmix_alpha)


def make_batch(seed):
  rng = np.random.default_rng(seed)
  # Each image is of one colour, so that a pixel tells its parts.
  colours = rng.permutation(256)[: SHAPE[0]].astype(np.uint8)
  images = np.broadcast_to(colours[:, None, None, None], SHAPE)
  labels = rng.integers(CLASSES, size=SHAPE[0]).astype(np.int32)
  return {'image': images, 'label': labels, 'reward': np.ones(2)}


def kept_parts(batch, mixed):
  """The part of each pixel that is of its own image, [B, H, W, C]."""
  own = batch['image'].astype(float)
  other = own[::-1]
  return (mixed['image'] - other) / (own - other)


@hypothesis.given(
  seed=st.integers(0, 2**31 - 1),
  alphas=st.sampled_from([(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)]),
)
@hypothesis.settings(max_examples=80, deadline=None)
def test_labels_are_mixed_as_the_pixels_are(seed, alphas):
  batch = make_batch(seed)
  mixed = jax.device_get(mix(batch, seed, *alphas))
  parts = kept_parts(batch, mixed)
  kept = parts.mean()
  assert -1e-6 <= kept <= 1 + 1e-6
  one_hot = np.eye(CLASSES)[batch['label']]
  expected = kept * one_hot + (1 - kept) * one_hot[::-1]
  np.testing.assert_allclose(mixed['label'], expected, atol=1e-4)
  np.testing.assert_array_equal(mixed['reward'], batch['reward'])
  cut = np.isclose(parts, 0, atol=1e-4) | np.isclose(parts, 1, atol=1e-4)
  if not alphas[0]:
    assert cut.all()
  if not alphas[1]:
    np.testing.assert_allclose(parts, kept, atol=1e-4)
  if cut.all() and 0.01 < kept < 0.99:  # the pasted part is a box, the same in all
    boxes = np.round(1 - parts[..., 0])
    assert (boxes == boxes[0]).all()
    rows, columns = (np.flatnonzero(boxes[0].any(axis=axis)) for axis in (1, 0))
    assert boxes[0].sum() == len(rows) * len(columns)
    assert rows[-1] - rows[0] + 1 == len(rows)
    assert columns[-1] - columns[0] + 1 == len(columns)


def test_both_take_half_of_the_batches_and_follow_their_distributions():
  batch = make_batch(0)
  parts = np.stack(
    [
      kept_parts(batch, jax.device_get(mix(batch, seed, 0.8, 1.0)))[0, ..., 0]
      for seed in range(600)
    ]
  )
  spread = np.ptp(parts, axis=(1, 2))
  cuts = spread > 0.5
  blends = parts[~cuts].mean(axis=(1, 2))
  # A box may cover nothing or everything, which no pixel tells from a blend.
  assert 0.4 < cuts.mean() < 0.54
  blends = blends[(blends > 1e-3) & (blends < 1 - 1e-3)]
  # Beta(0.8, 0.8): mean 1/2, variance 1/(4 · 2.6).
  assert blends.mean() == pytest.approx(0.5, abs=4 * 0.31 / np.sqrt(len(blends)))
  assert blends.var() == pytest.approx(1 / 10.4, rel=0.15)
