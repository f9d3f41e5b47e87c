"""An encoder of text: BERT, and embeddings of sentences from it.

Normalised after each branch, with learned positions, as BERT (Devlin et al., 2018,
arXiv 1810.04805). MiniLM is a small one that was distilled (Wang et al., 2020, arXiv
2002.10957). A sentence's embedding is the mean over its tokens (Sentence-BERT, Reimers
and Gurevych, 2019, arXiv 1908.10084).
"""

import math

from flax import nnx
import jax
import jax.numpy as jnp

from fliqs_jax.errors import ConfigError

_EPSILON = 1e-12  # of the published checkpoints


class Block(nnx.Module):
  """Attention between all tokens and a perceptron, each added and normalised after."""

  def __init__(
    self, hidden_size: int, num_heads: int, mlp_size: int, *, rngs: nnx.Rngs
  ):
    """The arguments are those of `Encoder`."""
    self.num_heads = num_heads
    self.query = nnx.Linear(hidden_size, hidden_size, rngs=rngs)
    self.key = nnx.Linear(hidden_size, hidden_size, rngs=rngs)
    self.value = nnx.Linear(hidden_size, hidden_size, rngs=rngs)
    self.out = nnx.Linear(hidden_size, hidden_size, rngs=rngs)
    self.norm_attention = _norm(hidden_size, rngs)
    self.up = nnx.Linear(hidden_size, mlp_size, rngs=rngs)
    self.down = nnx.Linear(mlp_size, hidden_size, rngs=rngs)
    self.norm_mlp = _norm(hidden_size, rngs)

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
    return self.out(y.reshape(x.shape))


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
      rngs: for the weights.

    Raises:
      ConfigError: where the heads do not divide the hidden size.
    """
    if hidden_size % num_heads:
      raise ConfigError(
        f'hidden size {hidden_size}: expected a multiple of the {num_heads} heads'
      )
    self.tokens = nnx.Embed(vocabulary_size, hidden_size, rngs=rngs)
    self.positions = nnx.Embed(max_tokens, hidden_size, rngs=rngs)
    self.types = nnx.Embed(num_types, hidden_size, rngs=rngs)
    self.norm = _norm(hidden_size, rngs)
    self.blocks = nnx.List(
      Block(hidden_size, num_heads, mlp_size, rngs=rngs) for _ in range(depth)
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


def _norm(size, rngs):
  # A fast variance, a difference of squares, would lose digits against others' code.
  return nnx.LayerNorm(size, epsilon=_EPSILON, use_fast_variance=False, rngs=rngs)
