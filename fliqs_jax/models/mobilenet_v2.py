"""MobileNetV2 (Sandler et al., 2018, arXiv 1801.04381), in torchvision's structure."""

import functools
from typing import Any, NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp

from fliqs_jax.models.common import ModuleDef, fan_out_normal, make_divisible


class Stage(NamedTuple):
  """A row of the paper's Table 2."""

  expansion: int
  filters: int
  blocks: int
  strides: int  # of the first block


STAGES = (
  Stage(1, 16, 1, 1),
  Stage(6, 24, 2, 2),
  Stage(6, 32, 3, 2),
  Stage(6, 64, 4, 2),
  Stage(6, 96, 3, 1),
  Stage(6, 160, 3, 2),
  Stage(6, 320, 1, 1),
)


class InvertedResidual(nn.Module):
  """Expands, convolves each channel by itself, and projects without nonlinearity."""

  filters: int
  expansion: int
  strides: int
  conv: ModuleDef
  norm: ModuleDef

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """`[B, H, W, C] -> [B, H / strides, W / strides, filters]`."""
    y, hidden = x, self.expansion * x.shape[-1]
    if self.expansion > 1:
      y = self.conv(hidden, (1, 1), name='expand')(y)
      y = nn.relu6(self.norm(name='bn_expand')(y))
    y = self.conv(
        hidden, (3, 3), self.strides, padding=1, feature_group_count=hidden,
        name='depthwise',
    )(y)  # fmt: skip
    y = nn.relu6(self.norm(name='bn_depthwise')(y))
    y = self.conv(self.filters, (1, 1), name='project')(y)
    y = self.norm(name='bn_project')(y)
    return x + y if x.shape == y.shape else y


class MobileNetV2(nn.Module):
  """An inverted residual network for images.

  In training, dropout takes its randomness from `rngs={'dropout': key}`.

  Attributes:
    num_classes: outputs of the classifier.
    width: multiplies every channel count, rounded to a multiple of 8; the last
      convolution has no fewer than 1280.
    small_images: no stride in the stem and after the third stage, so that the image is
      halved twice instead of five times.
    dropout_rate: before the classifier.
    dtype: of the computation; parameters and batch statistics are float32.
    conv: the convolutions' class, `nn.Conv` or a partial of it.
    dense: the classifier's class, `nn.Dense` or a partial of it.
  """

  num_classes: int
  width: float = 1.0
  small_images: bool = False
  dropout_rate: float = 0.2
  dtype: Any = jnp.float32
  conv: ModuleDef = nn.Conv
  dense: ModuleDef = nn.Dense

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """Returns the logits `float32[B, num_classes]` of images `[B, H, W, C]`."""
    conv = functools.partial(
      self.conv, use_bias=False, kernel_init=fan_out_normal, dtype=self.dtype
    )
    norm = functools.partial(
      nn.BatchNorm, use_running_average=not train, momentum=0.9, dtype=self.dtype
    )
    x = x.astype(self.dtype)
    x = conv(
        make_divisible(32 * self.width), (3, 3), 1 if self.small_images else 2,
        padding=1, name='conv_init',
    )(x)  # fmt: skip
    x = nn.relu6(norm(name='bn_init')(x))
    for index, stage in enumerate(STAGES):
      strides = 1 if self.small_images and index > 2 else stage.strides
      for block in range(stage.blocks):
        x = InvertedResidual(
          filters=make_divisible(stage.filters * self.width),
          expansion=stage.expansion,
          strides=strides if block == 0 else 1,
          conv=conv,
          norm=norm,
          name=f'stage{index + 1}_block{block + 1}',
        )(x)
    x = conv(make_divisible(1280 * max(1.0, self.width)), (1, 1), name='conv_last')(x)
    x = nn.relu6(norm(name='bn_last')(x))
    x = jnp.mean(x, axis=(1, 2))
    x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
    x = self.dense(
        self.num_classes, kernel_init=nn.initializers.normal(0.01), dtype=self.dtype,
        name='classifier',
    )(x)  # fmt: skip
    return x.astype(jnp.float32)
