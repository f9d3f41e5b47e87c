"""A decoder of text: a transformer that predicts each token from those before it.

Normalised before each branch, with learned positions, as GPT-2 (Radford et al., 2019).
"""

import functools
import math
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fliqs_jax.errors import ConfigError
from fliqs_jax.models.common import ModuleDef

_normal = nn.initializers.normal(0.02)


class CausalAttention(nn.Module):
  """Attention of each token to itself and those before it, in several heads."""

  num_heads: int
  dense: ModuleDef

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """`[B, tokens, hidden] -> [B, tokens, hidden]`."""
    batch, tokens, hidden = x.shape
    size = hidden // self.num_heads
    query, key, value = (
      self.dense(hidden, name=name)(x).reshape(batch, tokens, self.num_heads, size)
      for name in ('query', 'key', 'value')
    )
    scores = jnp.einsum('bqhd,bkhd->bhqk', query / math.sqrt(size), key)
    # Added, which a CPU does faster than a selection. A softmax of bfloat16 would lose
    # the small weights of many tokens.
    scores = scores.astype(jnp.float32) + _hidden_from_view(tokens)
    weights = nn.softmax(scores).astype(x.dtype)
    y = jnp.einsum('bhqk,bkhd->bqhd', weights, value)
    return self.dense(hidden, name='out')(y.reshape(x.shape))


def _hidden_from_view(tokens):
  """Returns 0 where a query may see a key, and a large negative number elsewhere."""
  return np.triu(np.full((tokens, tokens), -1e9, np.float32), 1)


class DecoderBlock(nn.Module):
  """Attention and a perceptron, each normalised before and added to its input."""

  num_heads: int
  dense: ModuleDef
  norm: ModuleDef

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """`[B, tokens, hidden] -> [B, tokens, hidden]`."""
    y = self.norm(name='norm_attention')(x)
    x = x + CausalAttention(self.num_heads, self.dense, name='attention')(y)
    y = self.norm(name='norm_mlp')(x)
    y = nn.relu(self.dense(4 * x.shape[-1], name='up')(y))
    return x + self.dense(x.shape[-1], name='down')(y)


class TransformerLM(nn.Module):
  """A language model. Its context is the length of what it is initialised with.

  Attributes:
    num_classes: values of a token.
    width: multiplies the hidden size; the number of heads stays.
    hidden_size: channels of a token.
    depth: the number of blocks.
    num_heads: of the attention, which must divide the scaled hidden size.
    dtype: of the computation; parameters are float32.
    conv: unused, since there are no convolutions.
    dense: the class of all layers but the embedding, `nn.Dense` or a partial of it.
  """

  num_classes: int
  width: float = 1.0
  hidden_size: int = 512
  depth: int = 6
  num_heads: int = 8
  dtype: Any = jnp.float32
  conv: ModuleDef = nn.Conv
  dense: ModuleDef = nn.Dense

  @nn.compact
  def __call__(self, tokens: jax.Array, train: bool) -> jax.Array:
    """Returns the logits `float32[B, T, num_classes]` of each next token of `[B, T]`.

    Raises:
      ConfigError: where the heads do not divide the hidden size, or without tokens.
    """
    del train  # nothing differs in training
    hidden = round(self.hidden_size * self.width)
    if hidden == 0 or hidden % self.num_heads:
      raise ConfigError(
        f'hidden size {hidden} ({self.hidden_size} at width {self.width}): expected '
        f'a multiple of the {self.num_heads} heads'
      )
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
      raise ConfigError(
        f'{tokens.dtype}{list(tokens.shape)}: expected whole numbers [B, T], which '
        'input.context makes of a text'
      )
    dense = functools.partial(self.dense, dtype=self.dtype)
    norm = functools.partial(nn.LayerNorm, dtype=self.dtype)
    x = nn.Embed(self.num_classes, hidden, dtype=self.dtype, name='embedding')(tokens)
    positions = self.param('position_embedding', _normal, (tokens.shape[1], hidden))
    x = x + positions.astype(self.dtype)
    for index in range(self.depth):
      x = DecoderBlock(self.num_heads, dense, norm, name=f'block{index + 1}')(x)
    x = norm(name='norm')(x)
    return dense(self.num_classes, name='head')(x).astype(jnp.float32)
