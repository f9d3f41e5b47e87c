"""Inception-v3 (Szegedy et al., 2016, arXiv 1512.00567), in torchvision's structure."""

import functools
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from fliqs_jax.errors import ConfigError
from fliqs_jax.models.common import ModuleDef

_SMALLEST_IMAGE = 75  # on a side: 1 after the last reduction


class ConvNorm(nn.Module):
  """A convolution, batch normalisation and a rectifier."""

  filters: int  # before `width` multiplies them
  kernel_size: tuple[int, int]
  strides: int = 1
  padding: str = 'SAME'
  stddev: float = 0.1  # of the initial kernel
  width: float = 1.0
  dtype: Any = jnp.float32
  conv: ModuleDef = nn.Conv
  norm: ModuleDef = nn.BatchNorm

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """`[B, H, W, C] -> [B, H', W', filters · width]`."""
    x = self.conv(
        max(1, round(self.filters * self.width)), self.kernel_size, self.strides,
        padding=self.padding, use_bias=False, dtype=self.dtype,
        kernel_init=nn.initializers.truncated_normal(self.stddev), name='conv',
    )(x)  # fmt: skip
    return nn.relu(self.norm(name='bn')(x))


def _chain(conv_norm, x, name, *layers, **last):
  """Applies layers `(filters, kernel_size)` one after the other.

  Args:
    conv_norm: their class.
    x: `[B, H, W, C]`.
    name: of the chain, to which the layers append their number.
    *layers: filters and kernel size of each.
    **last: other attributes of the last layer.
  """
  for index, (filters, kernel_size) in enumerate(layers):
    attributes = last if index == len(layers) - 1 else {}
    x = conv_norm(filters, kernel_size, name=f'{name}_{index + 1}', **attributes)(x)
  return x


def _average(x):
  return nn.avg_pool(x, (3, 3), padding='SAME')


class InceptionA(nn.Module):
  """Branches of 3×3 and 5×5 (Figure 5 of the paper)."""

  pool_filters: int
  conv_norm: ModuleDef

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """`[B, H, W, C] -> [B, H, W, 224 + pool_filters]` at width 1."""
    chain = functools.partial(_chain, self.conv_norm)
    branches = [
      chain(x, 'branch1x1', (64, (1, 1))),
      chain(x, 'branch5x5', (48, (1, 1)), (64, (5, 5))),
      chain(x, 'branch3x3', (64, (1, 1)), (96, (3, 3)), (96, (3, 3))),
      chain(_average(x), 'pool', (self.pool_filters, (1, 1))),
    ]
    return jnp.concatenate(branches, axis=-1)


class ReductionB(nn.Module):
  """Halves the image, from the first to the second group of blocks."""

  padding: str
  conv_norm: ModuleDef

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """`[B, H, W, C] -> [B, H / 2, W / 2, C + 480]` at width 1."""
    chain = functools.partial(_chain, self.conv_norm, strides=2, padding=self.padding)
    branches = [
      chain(x, 'branch3x3', (384, (3, 3))),
      chain(x, 'branch3x3_double', (64, (1, 1)), (96, (3, 3)), (96, (3, 3))),
      nn.max_pool(x, (3, 3), (2, 2), self.padding),
    ]
    return jnp.concatenate(branches, axis=-1)


class InceptionC(nn.Module):
  """Branches of 7×7, factorised into 1×7 and 7×1 (Figure 6)."""

  filters: int  # within the factorised branches
  conv_norm: ModuleDef

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """`[B, H, W, C] -> [B, H, W, 768]` at width 1."""
    chain = functools.partial(_chain, self.conv_norm)
    filters, row, column = self.filters, (1, 7), (7, 1)
    branches = [
        chain(x, 'branch1x1', (192, (1, 1))),
        chain(x, 'branch7x7', (filters, (1, 1)), (filters, row), (192, column)),
        chain(
            x, 'branch7x7_double',
            (filters, (1, 1)), (filters, column), (filters, row), (filters, column),
            (192, row),
        ),
        chain(_average(x), 'pool', (192, (1, 1))),
    ]  # fmt: skip
    return jnp.concatenate(branches, axis=-1)


class ReductionD(nn.Module):
  """Halves the image, from the second to the third group of blocks."""

  padding: str
  conv_norm: ModuleDef

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """`[B, H, W, C] -> [B, H / 2, W / 2, C + 512]` at width 1."""
    chain = functools.partial(_chain, self.conv_norm, strides=2, padding=self.padding)
    branches = [
      chain(x, 'branch3x3', (192, (1, 1)), (320, (3, 3))),
      chain(x, 'branch7x7', (192, (1, 1)), (192, (1, 7)), (192, (7, 1)), (192, (3, 3))),
      nn.max_pool(x, (3, 3), (2, 2), self.padding),
    ]
    return jnp.concatenate(branches, axis=-1)


class InceptionE(nn.Module):
  """Branches that fork into 1×3 and 3×1 (Figure 7)."""

  conv_norm: ModuleDef

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """`[B, H, W, C] -> [B, H, W, 2048]` at width 1."""
    chain = functools.partial(_chain, self.conv_norm)
    single = chain(x, 'branch3x3', (384, (1, 1)))
    double = chain(x, 'branch3x3_double', (448, (1, 1)), (384, (3, 3)))
    branches = [
      chain(x, 'branch1x1', (320, (1, 1))),
      chain(single, 'branch3x3_row', (384, (1, 3))),
      chain(single, 'branch3x3_column', (384, (3, 1))),
      chain(double, 'branch3x3_double_row', (384, (1, 3))),
      chain(double, 'branch3x3_double_column', (384, (3, 1))),
      chain(_average(x), 'pool', (192, (1, 1))),
    ]
    return jnp.concatenate(branches, axis=-1)


class AuxiliaryHead(nn.Module):
  """A second classifier, in the middle of the network."""

  num_classes: int
  dtype: Any
  conv_norm: ModuleDef

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """`[B, H, W, C] -> float32[B, num_classes]`."""
    # Smaller images than 299² leave less than the 5×5 windows here.
    window = lambda x: (min(5, x.shape[1]), min(5, x.shape[2]))
    x = nn.avg_pool(x, window(x), (3, 3))
    x = self.conv_norm(128, (1, 1), name='conv1')(x)
    x = self.conv_norm(768, window(x), padding='VALID', stddev=0.01, name='conv2')(x)
    x = nn.Dense(
        self.num_classes, kernel_init=nn.initializers.truncated_normal(0.001),
        dtype=self.dtype, name='classifier',
    )(jnp.mean(x, axis=(1, 2)))  # fmt: skip
    return x.astype(jnp.float32)


class InceptionV3(nn.Module):
  """An Inception network for images.

  In training, dropout takes its randomness from `rngs={'dropout': key}`.

  Attributes:
    num_classes: outputs of the classifier.
    width: multiplies every channel count.
    small_images: no stride or pooling in the stem, and padding everywhere, so that the
      image is halved twice instead of five times.
    aux_head: whether there is an auxiliary classifier. In training its logits,
      `float32[B, num_classes]`, are sown as `aux_logits` into the collection
      `intermediates`, which the caller makes mutable and adds to the loss. It plays no
      part in evaluation, so its layers are not injected and count in no cost.
    dropout_rate: before the classifier.
    dtype: of the computation; parameters and batch statistics are float32.
    conv: the convolutions' class, `nn.Conv` or a partial of it.
    dense: the classifier's class, `nn.Dense` or a partial of it.
  """

  num_classes: int
  width: float = 1.0
  small_images: bool = False
  aux_head: bool = False
  dropout_rate: float = 0.5
  dtype: Any = jnp.float32
  conv: ModuleDef = nn.Conv
  dense: ModuleDef = nn.Dense

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """Returns the logits `float32[B, num_classes]` of images `[B, H, W, C]`.

    Raises:
      ConfigError: where the images are so small that nothing would be left of them.
    """
    if min(x.shape[1:3]) < _SMALLEST_IMAGE and not self.small_images:
      raise ConfigError(
        f'images of {x.shape[1]}×{x.shape[2]}: expected {_SMALLEST_IMAGE} or more on '
        'a side, or small_images=True'
      )
    norm = functools.partial(
        nn.BatchNorm, use_running_average=not train, momentum=0.9, epsilon=1e-3,
        dtype=self.dtype,
    )  # fmt: skip
    plain = functools.partial(ConvNorm, width=self.width, dtype=self.dtype, norm=norm)
    conv_norm = functools.partial(plain, conv=self.conv)
    padding = 'SAME' if self.small_images else 'VALID'
    x = self._stem(conv_norm, padding, x.astype(self.dtype))
    for name, pool_filters in (('5b', 32), ('5c', 64), ('5d', 64)):
      x = InceptionA(pool_filters, conv_norm, name=f'mixed_{name}')(x)
    x = ReductionB(padding, conv_norm, name='mixed_6a')(x)
    for name, filters in (('6b', 128), ('6c', 160), ('6d', 160), ('6e', 192)):
      x = InceptionC(filters, conv_norm, name=f'mixed_{name}')(x)
    if self.aux_head and (train or self.is_initializing()):
      head = AuxiliaryHead(self.num_classes, self.dtype, plain, name='aux_head')
      self.sow('intermediates', 'aux_logits', head(x))
    x = ReductionD(padding, conv_norm, name='mixed_7a')(x)
    for name in ('7b', '7c'):
      x = InceptionE(conv_norm, name=f'mixed_{name}')(x)
    x = jnp.mean(x, axis=(1, 2))
    x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
    x = self.dense(
        self.num_classes, kernel_init=nn.initializers.truncated_normal(0.1),
        dtype=self.dtype, name='classifier',
    )(x)  # fmt: skip
    return x.astype(jnp.float32)

  def _stem(self, conv_norm, padding, x):
    strides = 1 if self.small_images else 2
    pool = lambda x: x if self.small_images else nn.max_pool(x, (3, 3), (2, 2))
    x = conv_norm(32, (3, 3), strides, padding, name='conv_1a')(x)
    x = conv_norm(32, (3, 3), padding=padding, name='conv_2a')(x)
    x = pool(conv_norm(64, (3, 3), name='conv_2b')(x))
    x = conv_norm(80, (1, 1), name='conv_3b')(x)
    return pool(conv_norm(192, (3, 3), padding=padding, name='conv_4a')(x))
