"""DeiT (Touvron et al., 2021, arXiv 2012.12877), the one that is not distilled."""

import functools
import math
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from fliqs_jax.errors import ConfigError
from fliqs_jax.models.common import ModuleDef

# The original truncates at ±2, a hundred deviations away: nowhere.
_normal = nn.initializers.normal(0.02)
_patch_uniform = nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')


class Attention(nn.Module):
  """Self-attention over all tokens, in several heads."""

  num_heads: int
  dense: ModuleDef

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """`[B, tokens, hidden] -> [B, tokens, hidden]`."""
    batch, tokens, hidden = x.shape
    size = hidden // self.num_heads
    qkv = self.dense(3 * hidden, name='qkv')(x)
    qkv = qkv.reshape(batch, tokens, 3, self.num_heads, size)
    query, key, value = (qkv[:, :, i] for i in range(3))
    scores = jnp.einsum('bqhd,bkhd->bhqk', query / math.sqrt(size), key)
    # A softmax of bfloat16 would lose the small weights of many tokens.
    weights = nn.softmax(scores.astype(jnp.float32)).astype(x.dtype)
    y = jnp.einsum('bhqk,bkhd->bqhd', weights, value)
    # Else XLA for TPUs applies the scale of `out` here, and writes this in float32.
    y = jax.lax.optimization_barrier(y.reshape(x.shape))
    return self.dense(hidden, name='out')(y)


class EncoderBlock(nn.Module):
  """Attention and a perceptron, each normalised before and added to its input."""

  num_heads: int
  drop_rate: float  # of either branch as a whole, for each example
  dense: ModuleDef
  norm: ModuleDef

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """`[B, tokens, hidden] -> [B, tokens, hidden]`."""
    drop = functools.partial(
      nn.Dropout, self.drop_rate, broadcast_dims=(1, 2), deterministic=not train
    )
    y = self.norm(name='norm_attention')(x)
    y = Attention(self.num_heads, self.dense, name='attention')(y)
    x = x + drop()(y)
    y = self.norm(name='norm_mlp')(x)
    y = self.dense(4 * x.shape[-1], name='mlp_in')(y)
    y = self.dense(x.shape[-1], name='mlp_out')(nn.gelu(y, approximate=False))
    return x + drop()(y)


class DeiT(nn.Module):
  """A vision transformer with a class token and learned positions.

  In training, stochastic depth takes its randomness from `rngs={'dropout': key}`.

  Attributes:
    hidden_size: channels of a token.
    num_heads: of the attention, which must divide the scaled hidden size.
    num_classes: outputs of the classifier.
    width: multiplies the hidden size; the number of heads stays.
    patch_size: side of the squares that an image is cut into, one token each.
    depth: the number of blocks.
    drop_path_rate: of the last block; that of the others rises linearly from 0.
    dtype: of the computation; parameters are float32.
    conv: the patch embedding's class, `nn.Conv` or a partial of it.
    dense: the class of all other layers, `nn.Dense` or a partial of it.
  """

  hidden_size: int
  num_heads: int
  num_classes: int
  width: float = 1.0
  patch_size: int = 16
  depth: int = 12
  drop_path_rate: float = 0.1
  dtype: Any = jnp.float32
  conv: ModuleDef = nn.Conv
  dense: ModuleDef = nn.Dense

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """Returns the logits `float32[B, num_classes]` of images `[B, H, W, C]`.

    Raises:
      ConfigError: where the heads do not divide the hidden size, or the patches the
        image.
    """
    hidden = round(self.hidden_size * self.width)
    if hidden == 0 or hidden % self.num_heads:
      raise ConfigError(
        f'hidden size {hidden} ({self.hidden_size} at width {self.width}): expected '
        f'a multiple of the {self.num_heads} heads'
      )
    if x.shape[1] % self.patch_size or x.shape[2] % self.patch_size:
      raise ConfigError(
        f'images of {x.shape[1]}×{x.shape[2]}: expected sides that are multiples of '
        f'patch_size={self.patch_size}'
      )
    dense = functools.partial(self.dense, kernel_init=_normal, dtype=self.dtype)
    norm = functools.partial(nn.LayerNorm, epsilon=1e-6, dtype=self.dtype)
    patch = (self.patch_size, self.patch_size)
    x = self.conv(
        hidden, patch, patch, padding='VALID', kernel_init=_patch_uniform,
        dtype=self.dtype, name='patch_embedding',
    )(x.astype(self.dtype))  # fmt: skip
    x = x.reshape(x.shape[0], -1, hidden)
    token = self.param('class_token', _normal, (1, 1, hidden))
    token = jnp.broadcast_to(token, (x.shape[0], 1, hidden)).astype(self.dtype)
    x = jnp.concatenate([token, x], axis=1)
    positions = self.param('position_embedding', _normal, (1, *x.shape[1:]))
    x = x + positions.astype(self.dtype)
    for index in range(self.depth):
      x = EncoderBlock(
        num_heads=self.num_heads,
        drop_rate=self.drop_path_rate * index / max(1, self.depth - 1),
        dense=dense,
        norm=norm,
        name=f'block{index + 1}',
      )(x, train)
    x = norm(name='norm')(x[:, 0])
    return dense(self.num_classes, name='classifier')(x).astype(jnp.float32)


DeiTTiny = functools.partial(DeiT, hidden_size=192, num_heads=3)
DeiTSmall = functools.partial(DeiT, hidden_size=384, num_heads=6)
DeiTBase = functools.partial(DeiT, hidden_size=768, num_heads=12)
