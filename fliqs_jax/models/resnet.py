"""Residual networks (He et al., 2016, arXiv 1512.03385), with the stride in the 3×3."""

import functools
from typing import Any
from collections.abc import Sequence

from flax import linen as nn
import jax
import jax.numpy as jnp

from fliqs_jax.models.common import ModuleDef, fan_out_normal


class BasicBlock(nn.Module):
  """Two 3×3 convolutions and a shortcut, projected where shapes differ."""

  filters: int
  strides: int
  project: bool  # also where shapes agree
  conv: ModuleDef
  norm: ModuleDef

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """`[B, H, W, C] -> [B, H / strides, W / strides, filters]`."""
    y = self.conv(self.filters, (3, 3), self.strides, padding=1, name='conv1')(x)
    y = nn.relu(self.norm(name='bn1')(y))
    y = self.conv(self.filters, (3, 3), padding=1, name='conv2')(y)
    # Each block starts as the identity (Goyal et al., 2017).
    y = self.norm(name='bn2', scale_init=nn.initializers.zeros)(y)
    if self.project or x.shape != y.shape:
      x = self.conv(self.filters, (1, 1), self.strides, name='conv_shortcut')(x)
      x = self.norm(name='bn_shortcut')(x)
    return nn.relu(x + y)


class BottleneckBlock(nn.Module):
  """A 3×3 convolution between two 1×1, the last four times as wide, and a shortcut."""

  filters: int  # of the 3×3
  strides: int
  project: bool  # also where shapes agree
  conv: ModuleDef
  norm: ModuleDef

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """`[B, H, W, C] -> [B, H / strides, W / strides, 4 · filters]`."""
    y = self.conv(self.filters, (1, 1), name='conv1')(x)
    y = nn.relu(self.norm(name='bn1')(y))
    y = self.conv(self.filters, (3, 3), self.strides, padding=1, name='conv2')(y)
    y = nn.relu(self.norm(name='bn2')(y))
    y = self.conv(4 * self.filters, (1, 1), name='conv3')(y)
    # Each block starts as the identity (Goyal et al., 2017).
    y = self.norm(name='bn3', scale_init=nn.initializers.zeros)(y)
    if self.project or x.shape != y.shape:
      x = self.conv(4 * self.filters, (1, 1), self.strides, name='conv_shortcut')(x)
      x = self.norm(name='bn_shortcut')(x)
    return nn.relu(x + y)


class ResNet(nn.Module):
  """A residual network for images.

  Attributes:
    stage_sizes: blocks in each stage.
    block: the kind of block.
    num_classes: outputs of the classifier.
    width: multiplies every channel count.
    small_images: a 3×3 stem without stride or pooling, instead of the 7×7 one.
    project_first_block: a projection in the first block too, as the network has whose
      costs FLIQS publishes.
    dtype: of the computation; parameters and batch statistics are float32.
    conv: the convolutions' class, `nn.Conv` or a partial of it.
    dense: the classifier's class, `nn.Dense` or a partial of it.
  """

  stage_sizes: Sequence[int]
  block: ModuleDef
  num_classes: int
  width: float = 1.0
  small_images: bool = False
  project_first_block: bool = False
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
    filters = round(64 * self.width)
    if self.small_images:
      x = conv(filters, (3, 3), padding=1, name='conv_init')(x)
    else:
      x = conv(filters, (7, 7), 2, padding=3, name='conv_init')(x)
    x = nn.relu(norm(name='bn_init')(x))
    if not self.small_images:
      x = nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
    for stage, size in enumerate(self.stage_sizes):
      for index in range(size):
        x = self.block(
          filters=round(64 * self.width * 2**stage),
          strides=2 if stage > 0 and index == 0 else 1,
          project=self.project_first_block and stage == index == 0,
          conv=conv,
          norm=norm,
          name=f'stage{stage + 1}_block{index + 1}',
        )(x)
    x = jnp.mean(x, axis=(1, 2))
    x = self.dense(self.num_classes, dtype=self.dtype, name='classifier')(x)
    return x.astype(jnp.float32)


ResNet18 = functools.partial(ResNet, stage_sizes=(2, 2, 2, 2), block=BasicBlock)
ResNet34 = functools.partial(ResNet, stage_sizes=(3, 4, 6, 3), block=BasicBlock)
ResNet50 = functools.partial(ResNet, stage_sizes=(3, 4, 6, 3), block=BottleneckBlock)
ResNet101 = functools.partial(ResNet, stage_sizes=(3, 4, 23, 3), block=BottleneckBlock)
