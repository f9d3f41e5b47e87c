"""Preprocessing of images in a step, on the device."""

import jax
import jax.numpy as jnp
import numpy as np

_INVERSE = (
  np.float32(np.float16(1 / 255)),
  np.float32(1 / 255 - float(np.float16(1 / 255))),
)


def normalize(
  images: jax.Array, mean: tuple[float, ...], stddev: tuple[float, ...]
) -> jax.Array:
  """Returns `(images / 255 − mean) / stddev`.

  Args:
    images: `[..., C]` in 0 … 255, uint8 or float32.
    mean: per channel, of pixels in [0, 1].
    stddev: per channel.
  """
  # Compilers multiply by the inverse of a constant, whose rounding would show. In two
  # parts, of which the first has an exact product with a pixel, it does not.
  images = images.astype(jnp.float32)
  pixels = images * _INVERSE[0] + images * _INVERSE[1]
  return (pixels - jnp.float32(mean)) / jnp.float32(stddev)


def mix(
  batch: dict[str, jax.Array],
  key: jax.Array,
  num_classes: int,
  mixup_alpha: float,
  cutmix_alpha: float,
) -> dict[str, jax.Array]:
  """Mixes each example with the one at the same place from the batch's other end.

  Mixup (Zhang et al., 2018, arXiv 1710.09412) blends whole images; cutmix (Yun et al.,
  2019, arXiv 1905.04899) pastes a box. Each takes part where its alpha is above 0; of
  both, a coin decides for the batch. Labels are mixed as the pixels are.

  One of the alphas at least must be above 0.

  Args:
    batch: `image: [B, H, W, C]`, uint8 or float32, and `label: int32[B]`; other entries
      are left alone.
    key: consumed.
    num_classes: of the labels.
    mixup_alpha: the kept part is distributed as Beta(alpha, alpha).
    cutmix_alpha: the same, before the box is cut at the image's edges.

  Returns:
    The batch with `image: float32[B, H, W, C]` and `label: float32[B, num_classes]`.
  """
  height, width = batch['image'].shape[1:3]
  coin_key, part_key, box_key = jax.random.split(key, 3)
  probability = (cutmix_alpha > 0) * (1 - 0.5 * (mixup_alpha > 0))
  cuts = jax.random.bernoulli(coin_key, probability)
  alpha = jnp.where(cuts, cutmix_alpha, mixup_alpha)
  part = jax.random.beta(part_key, alpha, alpha)
  outside = _outside_box(box_key, jnp.sqrt(1 - part), height, width)
  kept = jnp.where(cuts, outside, part)  # of each pixel
  labels = jax.nn.one_hot(batch['label'], num_classes)
  return {
    **batch,
    'image': _blend(batch['image'], kept[..., None]),
    'label': _blend(labels, jnp.mean(kept)),
  }


def _outside_box(key, side, height, width):
  """Returns 0 in a box somewhere, with this part of each side, and 1 elsewhere."""

  def within(key, length):
    half = jnp.floor(side * length) // 2
    offset = jnp.arange(length) - jax.random.randint(key, (), 0, length)
    return (-half <= offset) & (offset < half)

  rows, columns = map(within, jax.random.split(key), (height, width))
  return 1.0 - (rows[:, None] & columns)


def _blend(arrays, kept):
  others = jnp.flip(arrays, axis=0)
  return kept * arrays.astype(jnp.float32) + (1 - kept) * others.astype(jnp.float32)
