"""MobileNetV2 (Sandler et al., 2018, arXiv 1801.04381), in torchvision's structure.

What can be decided of its architecture (FLIQNAS, in FLIQS, arXiv 2308.03290): the width
of the stem, of each stage and of the head, and of each block the depthwise kernel, the
expansion and, after the first of a stage, whether it is there at all. Blocks of the
first stage do not expand, and so have no such choice; all others keep their first
convolution, at an expansion of 1 too.
"""

from collections.abc import Sequence
import functools
import itertools
from typing import Any, NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp

from fliqs_jax.layers.architecture import Choose, Size, largest, standard
from fliqs_jax.linen.supernet import gated, tell_sizes
from fliqs_jax.models.common import (
  WIDTH_MULTIPLIERS,
  ModuleDef,
  fan_out_normal,
  make_divisible,
)


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

  inputs: Size
  hidden: Size
  filters: Size
  kernel: Size
  present: Size
  expand: bool  # whether there is a convolution that expands
  residual: bool
  strides: int
  conv: ModuleDef
  norm: ModuleDef

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """`[B, H, W, inputs] -> [B, H / strides, W / strides, filters]`."""
    y, hidden, kernel = x, largest(self.hidden), largest(self.kernel)
    conv = functools.partial(tell_sizes, self.conv, present=self.present)
    if self.expand:
      expand = conv(inputs=self.inputs, outputs=self.hidden)
      y = expand(hidden, (1, 1), name='expand')(y)
      y = nn.relu6(self.norm(name='bn_expand')(y))
    depthwise = conv(inputs=self.hidden, outputs=self.hidden, kernel=self.kernel)
    y = depthwise(
        hidden, (kernel, kernel), self.strides, padding=kernel // 2,
        feature_group_count=hidden, name='depthwise',
    )(y)  # fmt: skip
    y = nn.relu6(self.norm(name='bn_depthwise')(y))
    project = conv(inputs=self.hidden, outputs=self.filters)
    y = project(largest(self.filters), (1, 1), name='project')(y)
    y = self.norm(name='bn_project')(y)
    return x + gated(y, self.present) if self.residual else y


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
    stages: the rows of the paper's Table 2, each a `Stage` or its four numbers.
    last_filters: of the last convolution.
    choose: how the architecture is chosen, by default as the paper's.
    kernels: what can be chosen for a depthwise convolution, odd.
    expansions: what can be chosen for a block.
    multipliers: what can be chosen for the width of the stem, a stage or the head.
    dtype: of the computation; parameters and batch statistics are float32.
    conv: the convolutions' class, `nn.Conv` or a partial of it.
    dense: the classifier's class, `nn.Dense` or a partial of it.
  """

  num_classes: int
  width: float = 1.0
  small_images: bool = False
  dropout_rate: float = 0.2
  dtype: Any = jnp.float32
  stages: Sequence[Sequence[int]] = STAGES
  last_filters: int = 1280
  choose: Choose = standard
  kernels: Sequence[int] = (3, 5, 7)
  expansions: Sequence[int] = (1, 3, 6)
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
    width = self._choose_width('stem', 32 * self.width)
    x = tell_sizes(conv, outputs=width)(
        largest(width), (3, 3), 1 if self.small_images else 2, padding=1,
        name='conv_init',
    )(x)  # fmt: skip
    x = nn.relu6(norm(name='bn_init')(x))
    for index, stage in enumerate(itertools.starmap(Stage, self.stages)):
      strides = 1 if self.small_images and index > 2 else stage.strides
      stage_name = f'stage{index + 1}'
      filters = self._choose_width(stage_name, stage.filters * self.width)
      for block in range(stage.blocks):
        x = self._block(
          f'{stage_name}_block{block + 1}',
          x,
          stage,
          inputs=filters if block else width,
          filters=filters,
          strides=1 if block else strides,
          first=block == 0,
          conv=conv,
          norm=norm,
        )
      width = filters
    last = self._choose_width('head', self.last_filters * max(1.0, self.width))
    x = tell_sizes(conv, inputs=width, outputs=last)(
      largest(last), (1, 1), name='conv_last'
    )(x)
    x = nn.relu6(norm(name='bn_last')(x))
    x = jnp.mean(x, axis=(1, 2))
    x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
    x = tell_sizes(self.dense, inputs=last)(
        self.num_classes, kernel_init=nn.initializers.normal(0.01), dtype=self.dtype,
        name='classifier',
    )(x)  # fmt: skip
    return x.astype(jnp.float32)

  def _choose_width(self, name, channels):
    options = [make_divisible(channels * multiplier) for multiplier in self.multipliers]
    return self.choose(f'{name}/width', options, make_divisible(channels))

  def _block(self, name, x, stage, inputs, filters, strides, first, **attributes):
    expansion = stage.expansion
    if expansion > 1:
      expansion = self.choose(f'{name}/expansion', self.expansions, expansion)
    kernel = self.choose(f'{name}/kernel', self.kernels, 3)
    present = 1 if first else self.choose(f'{name}/present', (0, 1), 1)
    if present == 0:
      return x
    # Widths that a search makes equal by chance connect nothing.
    by_chance = self.choose.is_standard and strides == 1 and inputs == filters
    return InvertedResidual(
      inputs=inputs,
      hidden=inputs * expansion,
      filters=filters,
      kernel=kernel,
      present=present,
      expand=stage.expansion > 1,
      residual=not first or by_chance,
      strides=strides,
      name=name,
      **attributes,
    )(x)
