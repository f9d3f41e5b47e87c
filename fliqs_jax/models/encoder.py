"""An encoder of text: BERT, embeddings of sentences from it, and what it is trained by.

Normalised after each branch, with learned positions, as BERT (Devlin et al., 2018,
arXiv 1810.04805). MiniLM is a small one that was distilled (Wang et al., 2020, arXiv
2002.10957). A sentence's embedding is the mean over its tokens (Sentence-BERT, Reimers
and Gurevych, 2019, arXiv 1908.10084).
"""

import functools
import math

from flax import nnx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from fliqs_jax.errors import ConfigError

_EPSILON = 1e-12  # of the published checkpoints


class Block(nnx.Module):
  """Attention between all tokens and a perceptron, each added and normalised after."""

  def __init__(
    self,
    hidden_size: int,
    num_heads: int,
    mlp_size: int,
    dtype: DTypeLike = jnp.float32,
    *,
    rngs: nnx.Rngs,
  ):
    """The arguments are those of `Encoder`."""
    linear = functools.partial(nnx.Linear, dtype=dtype, rngs=rngs)
    self.num_heads = num_heads
    self.query = linear(hidden_size, hidden_size)
    self.key = linear(hidden_size, hidden_size)
    self.value = linear(hidden_size, hidden_size)
    self.out = linear(hidden_size, hidden_size)
    self.norm_attention = _norm(hidden_size, dtype, rngs)
    self.up = linear(hidden_size, mlp_size)
    self.down = linear(mlp_size, hidden_size)
    self.norm_mlp = _norm(hidden_size, dtype, rngs)

  def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
    """`[B, T, hidden_size] -> [B, T, hidden_size]`, with the mask `[B, T]`."""
    x = self.norm_attention(x + self._attention(x, mask))
    y = jax.nn.gelu(self.up(x), approximate=False)
    return self.norm_mlp(x + self.down(y))

  def _attention(self, x, mask):
    batch, tokens, hidden = x.shape
    size = hidden // self.num_heads
    query, key, value = (
      layer(x).reshape(batch, tokens, self.num_heads, size)
      for layer in (self.query, self.key, self.value)
    )
    scores = jnp.einsum('bqhd,bkhd->bhqk', query / math.sqrt(size), key)
    # Finite, so that a sentence without any token gives no NaN.
    hidden_from_view = jnp.where(mask, 0.0, -1e9)[:, None, None, :]
    weights = jax.nn.softmax(scores + hidden_from_view)
    y = jnp.einsum('bhqk,bkhd->bqhd', weights, value)
    # Else XLA for TPUs applies the scale of `out` here, and writes this in float32.
    return self.out(jax.lax.optimization_barrier(y.reshape(x.shape)))


class Encoder(nnx.Module):
  """A transformer whose tokens all see each other; by default of MiniLM-L6's sizes."""

  def __init__(
    self,
    *,
    vocabulary_size: int = 30522,
    hidden_size: int = 384,
    depth: int = 6,
    num_heads: int = 12,
    mlp_size: int = 1536,
    max_tokens: int = 512,
    num_types: int = 2,
    dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
  ):
    """Draws the weights.

    Args:
      vocabulary_size: values of a token.
      hidden_size: channels of a token, a multiple of the heads.
      depth: the number of blocks.
      num_heads: of the attention.
      mlp_size: channels within the perceptron.
      max_tokens: the longest text.
      num_types: of the segments that a text may have.
      dtype: of the computation.
      rngs: for the weights.

    Raises:
      ConfigError: where the heads do not divide the hidden size.
    """
    if hidden_size % num_heads:
      raise ConfigError(
        f'hidden size {hidden_size}: expected a multiple of the {num_heads} heads'
      )
    embed = functools.partial(nnx.Embed, dtype=dtype, rngs=rngs)
    self.tokens = embed(vocabulary_size, hidden_size)
    self.positions = embed(max_tokens, hidden_size)
    self.types = embed(num_types, hidden_size)
    self.norm = _norm(hidden_size, dtype, rngs)
    self.blocks = nnx.List(
      Block(hidden_size, num_heads, mlp_size, dtype, rngs=rngs) for _ in range(depth)
    )

  def __call__(
    self, tokens: jax.Array, mask: jax.Array, types: jax.Array | None = None
  ) -> jax.Array:
    """Returns what each token means in its text, float32[B, T, hidden_size].

    Args:
      tokens: int32[B, T].
      mask: bool or integer [B, T], zero for tokens that only fill up a text.
      types: int32[B, T], the segment of each token; None for the first one.

    Raises:
      ConfigError: where there are more tokens than positions.
    """
    length = tokens.shape[1]
    if length > self.positions.num_embeddings:
      raise ConfigError(
        f'{length} tokens: expected at most {self.positions.num_embeddings}'
      )
    types = jnp.zeros_like(tokens) if types is None else types
    x = self.tokens(tokens) + self.positions(jnp.arange(length)) + self.types(types)
    x = self.norm(x)
    for block in self.blocks:
      x = block(x, mask)
    return x


class SentenceEncoder(nnx.Module):
  """An encoder whose output is one vector of length 1 for each text.

  Attributes:
    encoder: gives the vectors of the tokens, of which it is the mean.
  """

  def __init__(self, encoder: Encoder):
    """Takes an encoder, which it shares."""
    self.encoder = encoder

  def __call__(self, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    """Returns the embeddings float32[B, hidden_size] of texts, as `Encoder` takes them.

    The cosine of two texts is the scalar product of their embeddings.
    """
    weights = mask[:, :, None].astype(jnp.float32)
    sums = jnp.sum(self.encoder(tokens, mask) * weights, 1)
    # The smallest ones are of sentence-transformers.
    mean = sums / jnp.maximum(jnp.sum(weights, 1), 1e-9)
    return mean / jnp.maximum(jnp.linalg.norm(mean, axis=1, keepdims=True), 1e-12)


class MaskedLanguageModel(nnx.Module):
  """An encoder that tells what is hidden in a text, as BERT is trained.

  The last product is that of the embeddings, and a bias.

  Args:
    width: multiplies the hidden and the MLP's size.
    rngs: for the weights.
    **sizes: the other arguments of `Encoder`.
  """

  def __init__(
    self,
    *,
    width: float = 1.0,
    hidden_size: int = 384,
    mlp_size: int = 1536,
    dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
    **sizes: int,
  ):
    """Draws the weights, float32; the class describes the arguments."""
    hidden_size, mlp_size = round(width * hidden_size), round(width * mlp_size)
    self.encoder = Encoder(
      hidden_size=hidden_size, mlp_size=mlp_size, dtype=dtype, rngs=rngs, **sizes
    )
    self.transform = nnx.Linear(hidden_size, hidden_size, dtype=dtype, rngs=rngs)
    self.norm = _norm(hidden_size, dtype, rngs)
    self.bias = nnx.Param(jnp.zeros(self.encoder.tokens.num_embeddings))

  def __call__(self, tokens: jax.Array, train: bool = False) -> jax.Array:
    """Returns the logits of each token, float32[B, T, vocabulary_size].

    Args:
      tokens: int32[B, T], 0 for those that only fill up a text.
      train: of no effect, since nothing differs in training.
    """
    del train
    x = self.encoder(tokens, tokens != 0)
    x = self.norm(jax.nn.gelu(self.transform(x), approximate=False))
    return self.encoder.tokens.attend(x).astype(jnp.float32) + self.bias[...]


def _norm(size, dtype, rngs):
  # A fast variance, a difference of squares, would lose digits against others' code.
  return nnx.LayerNorm(
    size, epsilon=_EPSILON, use_fast_variance=False, dtype=dtype, rngs=rngs
  )
