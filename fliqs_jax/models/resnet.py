"""Residual networks (He et al., 2016, arXiv 1512.03385), with the stride in the 3×3.

What can be decided of their architecture: the width of each stage, that of the first
being the stem's too, and of each block after the first of a stage whether it is there.
"""

from collections.abc import Sequence
import functools
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from fliqs_jax.layers.architecture import Choose, Size, largest, standard
from fliqs_jax.linen.supernet import gated, tell_sizes
from fliqs_jax.models.common import WIDTH_MULTIPLIERS, ModuleDef, fan_out_normal


class BasicBlock(nn.Module):
  """Two 3×3 convolutions and a shortcut, projected where shapes differ."""

  inputs: Size
  filters: Size
  present: Size
  strides: int
  project: bool  # also where shapes agree
  conv: ModuleDef
  norm: ModuleDef

  expansion = 1  # how many times as wide as the filters the result is

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """`[B, H, W, C] -> [B, H / strides, W / strides, filters]`."""
    conv = functools.partial(
      tell_sizes, self.conv, outputs=self.filters, present=self.present
    )
    first, second = conv(inputs=self.inputs), conv(inputs=self.filters)
    filters = largest(self.filters)
    y = first(filters, (3, 3), self.strides, padding=1, name='conv1')(x)
    y = nn.relu(self.norm(name='bn1')(y))
    y = second(filters, (3, 3), padding=1, name='conv2')(y)
    # Each block starts as the identity (Goyal et al., 2017).
    y = self.norm(name='bn2', scale_init=nn.initializers.zeros)(y)
    y = gated(y, self.present)
    if self.project or x.shape != y.shape:
      x = first(filters, (1, 1), self.strides, name='conv_shortcut')(x)
      x = self.norm(name='bn_shortcut')(x)
    return nn.relu(x + y)


class BottleneckBlock(nn.Module):
  """A 3×3 convolution between two 1×1, the last four times as wide, and a shortcut."""

  inputs: Size
  filters: Size  # of the 3×3
  present: Size
  strides: int
  project: bool  # also where shapes agree
  conv: ModuleDef
  norm: ModuleDef

  expansion = 4  # how many times as wide as the filters the result is

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """`[B, H, W, C] -> [B, H / strides, W / strides, 4 · filters]`."""
    conv = functools.partial(tell_sizes, self.conv, present=self.present)
    filters, outputs = self.filters, self.expansion * self.filters
    first = conv(inputs=self.inputs, outputs=filters)
    second = conv(inputs=filters, outputs=filters)
    third = conv(inputs=filters, outputs=outputs)
    shortcut = conv(inputs=self.inputs, outputs=outputs)
    filters, outputs = largest(filters), largest(outputs)
    y = first(filters, (1, 1), name='conv1')(x)
    y = nn.relu(self.norm(name='bn1')(y))
    y = second(filters, (3, 3), self.strides, padding=1, name='conv2')(y)
    y = nn.relu(self.norm(name='bn2')(y))
    y = third(outputs, (1, 1), name='conv3')(y)
    # Each block starts as the identity (Goyal et al., 2017).
    y = self.norm(name='bn3', scale_init=nn.initializers.zeros)(y)
    y = gated(y, self.present)
    if self.project or x.shape != y.shape:
      x = shortcut(outputs, (1, 1), self.strides, name='conv_shortcut')(x)
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
    choose: how the architecture is chosen, by default as published.
    multipliers: what can be chosen for the width of a stage.
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
  choose: Choose = standard
  multipliers: Sequence[float] = WIDTH_MULTIPLIERS
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
    widths = [self._choose_width(stage) for stage in range(len(self.stage_sizes))]
    width = widths[0]
    stem = tell_sizes(conv, outputs=width)
    if self.small_images:
      x = stem(largest(width), (3, 3), padding=1, name='conv_init')(x)
    else:
      x = stem(largest(width), (7, 7), 2, padding=3, name='conv_init')(x)
    x = nn.relu(norm(name='bn_init')(x))
    if not self.small_images:
      x = nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
    for stage, size in enumerate(self.stage_sizes):
      for index in range(size):
        name, first = f'stage{stage + 1}_block{index + 1}', index == 0
        present = 1 if first else self.choose(f'{name}/present', (0, 1), 1)
        if present == 0:
          continue
        project_first = self.project_first_block or self.block.expansion > 1
        x = self.block(
          inputs=width,
          filters=widths[stage],
          present=present,
          strides=2 if stage > 0 and first else 1,
          project=first and (stage > 0 or project_first),
          conv=conv,
          norm=norm,
          name=name,
        )(x)
        width = self.block.expansion * widths[stage]
    x = jnp.mean(x, axis=(1, 2))
    x = tell_sizes(self.dense, inputs=width)(
      self.num_classes, dtype=self.dtype, name='classifier'
    )(x)
    return x.astype(jnp.float32)

  def _choose_width(self, stage):
    base = 64 * self.width * 2**stage
    options = [round(base * multiplier) for multiplier in self.multipliers]
    return self.choose(f'stage{stage + 1}/width', options, round(base))


ResNet18 = functools.partial(ResNet, stage_sizes=(2, 2, 2, 2), block=BasicBlock)
ResNet34 = functools.partial(ResNet, stage_sizes=(3, 4, 6, 3), block=BasicBlock)
ResNet50 = functools.partial(ResNet, stage_sizes=(3, 4, 6, 3), block=BottleneckBlock)
ResNet101 = functools.partial(ResNet, stage_sizes=(3, 4, 23, 3), block=BottleneckBlock)
