"""EfficientNet (Tan and Le, 2019, arXiv 1905.11946), as in its authors' code."""

import functools
import math
from typing import Any, NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp

from fliqs_jax.models.common import ModuleDef, fan_out_normal, make_divisible

# A depthwise kernel, [height, width, 1, channels], has one output per input channel.
_depthwise_normal = nn.initializers.variance_scaling(2.0, 'fan_in', 'normal')
_classifier_uniform = nn.initializers.variance_scaling(1 / 3, 'fan_out', 'uniform')


class Stage(NamedTuple):
  """A row of the paper's Table 1."""

  expansion: int
  kernel_size: int
  filters: int
  blocks: int
  strides: int  # of the first block


STAGES = (
  Stage(1, 3, 16, 1, 1),
  Stage(6, 3, 24, 2, 2),
  Stage(6, 5, 40, 2, 2),
  Stage(6, 3, 80, 3, 2),
  Stage(6, 5, 112, 3, 1),
  Stage(6, 5, 192, 4, 2),
  Stage(6, 3, 320, 1, 1),
)


class SqueezeExcite(nn.Module):
  """Scales channels by a function of their means (Hu et al., 2018, arXiv 1709.01507).

  Its layers are not injected: they see one value per channel, and costs leave them out.
  """

  squeezed: int
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """`[B, H, W, C] -> [B, H, W, C]`."""
    dense = functools.partial(nn.Dense, kernel_init=fan_out_normal, dtype=self.dtype)
    y = jnp.mean(x, axis=(1, 2), keepdims=True)
    y = nn.swish(dense(self.squeezed, name='reduce')(y))
    return x * nn.sigmoid(dense(x.shape[-1], name='expand')(y))


class MBConv(nn.Module):
  """An inverted residual block with squeeze-excite and stochastic depth."""

  filters: int
  kernel_size: int
  expansion: int
  strides: int
  drop_rate: float  # of the block as a whole, for each example
  dtype: Any
  conv: ModuleDef
  norm: ModuleDef

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """`[B, H, W, C] -> [B, H / strides, W / strides, filters]`."""
    y, hidden = x, self.expansion * x.shape[-1]
    if self.expansion > 1:
      y = self.conv(hidden, (1, 1), name='expand')(y)
      y = nn.swish(self.norm(name='bn_expand')(y))
    y = self.conv(
        hidden, (self.kernel_size, self.kernel_size), self.strides,
        feature_group_count=hidden, kernel_init=_depthwise_normal, name='depthwise',
    )(y)  # fmt: skip
    y = nn.swish(self.norm(name='bn_depthwise')(y))
    # A quarter of the block's input, not of the expanded channels.
    squeezed = max(1, x.shape[-1] // 4)
    y = SqueezeExcite(squeezed, self.dtype, name='squeeze_excite')(y)
    y = self.conv(self.filters, (1, 1), name='project')(y)
    y = self.norm(name='bn_project')(y)
    if x.shape != y.shape:
      return y
    drop = nn.Dropout(self.drop_rate, broadcast_dims=(1, 2, 3), deterministic=not train)
    return x + drop(y)


class EfficientNet(nn.Module):
  """A convolutional network for images, scaled in width and depth together.

  In training, dropout and stochastic depth take their randomness from
  `rngs={'dropout': key}`.

  Attributes:
    width_coefficient: multiplies every channel count of B0.
    depth_coefficient: multiplies the blocks of each stage of B0.
    dropout_rate: before the classifier.
    num_classes: outputs of the classifier.
    width: multiplies every channel count once more; counts are rounded to multiples
      of 8.
    small_images: no stride in the stem and after the third stage, so that the image is
      halved twice instead of five times.
    drop_path_rate: of the last block; that of the others rises linearly from 0.
    dtype: of the computation; parameters and batch statistics are float32.
    conv: the convolutions' class, `nn.Conv` or a partial of it.
    dense: the classifier's class, `nn.Dense` or a partial of it.
  """

  width_coefficient: float
  depth_coefficient: float
  dropout_rate: float
  num_classes: int
  width: float = 1.0
  small_images: bool = False
  drop_path_rate: float = 0.2
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
        nn.BatchNorm, use_running_average=not train, momentum=0.99, epsilon=1e-3,
        dtype=self.dtype,
    )  # fmt: skip
    x = x.astype(self.dtype)
    strides = 1 if self.small_images else 2
    x = conv(self._channels(32), (3, 3), strides, name='conv_init')(x)
    x = nn.swish(norm(name='bn_init')(x))
    depths = [math.ceil(self.depth_coefficient * stage.blocks) for stage in STAGES]
    for index, (stage, depth) in enumerate(zip(STAGES, depths)):
      strides = 1 if self.small_images and index > 2 else stage.strides
      for block in range(depth):
        position = (sum(depths[:index]) + block) / sum(depths)
        x = MBConv(
          filters=self._channels(stage.filters),
          kernel_size=stage.kernel_size,
          expansion=stage.expansion,
          strides=strides if block == 0 else 1,
          drop_rate=self.drop_path_rate * position,
          dtype=self.dtype,
          conv=conv,
          norm=norm,
          name=f'stage{index + 1}_block{block + 1}',
        )(x, train)
    x = conv(self._channels(1280), (1, 1), name='conv_last')(x)
    x = nn.swish(norm(name='bn_last')(x))
    x = jnp.mean(x, axis=(1, 2))
    x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
    x = self.dense(
        self.num_classes, kernel_init=_classifier_uniform, dtype=self.dtype,
        name='classifier',
    )(x)  # fmt: skip
    return x.astype(jnp.float32)

  def _channels(self, channels):
    return make_divisible(channels * self.width_coefficient * self.width)


def _variant(width, depth, dropout_rate):
  return functools.partial(
    EfficientNet,
    width_coefficient=width,
    depth_coefficient=depth,
    dropout_rate=dropout_rate,
  )


EfficientNetB0 = _variant(1.0, 1.0, 0.2)  # for images of 224²
EfficientNetB1 = _variant(1.0, 1.1, 0.2)  # 240²
EfficientNetB2 = _variant(1.1, 1.2, 0.3)  # 260²
EfficientNetB3 = _variant(1.2, 1.4, 0.3)  # 300²
EfficientNetB4 = _variant(1.4, 1.8, 0.4)  # 380²
