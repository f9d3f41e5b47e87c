"""A decoder of text: Llama, Gemma, and Mixtral with experts.

Normalised before each branch by the root mean square (Zhang and Sennrich, 2019, arXiv
1910.07467), with rotary positions (Su et al., 2021, arXiv 2104.09864), heads that share
keys and values in groups (Ainslie et al., 2023, arXiv 2305.13245), and gated
perceptrons (Shazeer, 2020, arXiv 2002.05202).
"""

from collections.abc import Callable
import math
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from fliqs_jax.errors import ConfigError, not_among
from fliqs_jax.models.experts import Experts

ACTIVATIONS = {'silu': jax.nn.silu, 'gelu': jax.nn.gelu}  # the latter by tanh

# Sizes of published networks.
GEMMA_2B: dict[str, Any] = {
  'vocabulary_size': 256_128, 'hidden_size': 2_048, 'depth': 18, 'num_heads': 8,
  'num_kv_heads': 1, 'head_size': 256, 'mlp_size': 16_384, 'activation': 'gelu',
  'scales_embedding': True,
}  # fmt: skip
GEMMA_7B: dict[str, Any] = {
  **GEMMA_2B, 'hidden_size': 3_072, 'depth': 28, 'num_heads': 16, 'num_kv_heads': 16,
  'mlp_size': 24_576,
}  # fmt: skip
LLAMA_2_7B: dict[str, Any] = {
  'vocabulary_size': 32_000, 'hidden_size': 4_096, 'depth': 32, 'num_heads': 32,
  'num_kv_heads': 32, 'head_size': 128, 'mlp_size': 11_008, 'tied': False,
  'norm_epsilon': 1e-5,
}  # fmt: skip
LLAMA_3_2_1B: dict[str, Any] = {
  'vocabulary_size': 128_256, 'hidden_size': 2_048, 'depth': 16, 'num_heads': 32,
  'num_kv_heads': 8, 'head_size': 64, 'mlp_size': 8_192, 'rotary_base': 500_000.0,
  'norm_epsilon': 1e-5,
}  # fmt: skip
MIXTRAL_8X7B: dict[str, Any] = {
  **LLAMA_2_7B, 'num_kv_heads': 8, 'mlp_size': 14_336, 'num_experts': 8,
  'experts_per_token': 2, 'rotary_base': 1e6,
}  # fmt: skip


def rotate(x: jax.Array, positions: jax.Array, base: float = 10_000.0) -> jax.Array:
  """Rotates pairs of channels by angles that grow with the position.

  Channel i is paired with i + H / 2, as in the checkpoints on Hugging Face, and rotated
  by `position · base^(−2i / H)`.

  Args:
    x: [B, T, N, H], N heads of H channels, an even number.
    positions: int32[T].
    base: of the angles.
  """
  half = x.shape[-1] // 2
  angles = positions[:, None, None] * base ** -(jnp.arange(half) / half)
  cos, sin = jnp.cos(angles), jnp.sin(angles)
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  rotated = first * cos - second * sin, second * cos + first * sin
  return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


class Attention(nnx.Module):
  """Attention of each token to itself and those before it, in grouped heads."""

  def __init__(
    self,
    hidden_size: int,
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    rotary_base: float,
    dtype: DTypeLike,
    *,
    rngs: nnx.Rngs,
  ):
    """The arguments are those of `Decoder`."""
    self.heads = {'query': num_heads, 'key': num_kv_heads, 'value': num_kv_heads}
    self.head_size = head_size
    self.rotary_base = rotary_base

    def linear(inputs, outputs):
      return nnx.Linear(inputs, outputs, use_bias=False, dtype=dtype, rngs=rngs)

    self.query = linear(hidden_size, num_heads * head_size)
    self.key = linear(hidden_size, num_kv_heads * head_size)
    self.value = linear(hidden_size, num_kv_heads * head_size)
    self.out = linear(num_heads * head_size, hidden_size)

  def __call__(self, x: jax.Array) -> jax.Array:
    """`[B, T, hidden_size] -> [B, T, hidden_size]`."""
    batch, tokens, _ = x.shape
    query, key, value = (
      getattr(self, name)(x).reshape(batch, tokens, heads, self.head_size)
      for name, heads in self.heads.items()
    )
    positions = jnp.arange(tokens)
    query = rotate(query, positions, self.rotary_base)
    key = rotate(key, positions, self.rotary_base)
    y = jax.nn.dot_product_attention(query, key, value, is_causal=True)
    # Else XLA for TPUs applies the scale of `out` here, and writes this in float32.
    return self.out(jax.lax.optimization_barrier(y.reshape(batch, tokens, -1)))


class GatedMLP(nnx.Module):
  """A perceptron whose channels are multiplied by those of a gate."""

  def __init__(
    self,
    hidden_size: int,
    mlp_size: int,
    activation: Any,
    dtype: DTypeLike,
    *,
    rngs: nnx.Rngs,
  ):
    """The arguments are those of `Decoder`."""
    self.activation = activation

    def linear(inputs, outputs):
      return nnx.Linear(inputs, outputs, use_bias=False, dtype=dtype, rngs=rngs)

    self.gate = linear(hidden_size, mlp_size)
    self.up = linear(hidden_size, mlp_size)
    self.down = linear(mlp_size, hidden_size)

  def __call__(self, x: jax.Array) -> jax.Array:
    """`[B, T, hidden_size] -> [B, T, hidden_size]`."""
    return self.down(self.activation(self.gate(x)) * self.up(x))


class Block(nnx.Module):
  """Attention and a perceptron, each normalised before and added to its input."""

  def __init__(self, make_norm: Callable[[], nnx.RMSNorm], attention: Attention, mlp):
    """Takes what makes a normalisation, and a `GatedMLP` or `Experts`."""
    self.norm_attention = make_norm()
    self.attention = attention
    self.norm_mlp = make_norm()
    self.mlp = mlp

  def __call__(self, x: jax.Array) -> jax.Array:
    """`[B, T, hidden_size] -> [B, T, hidden_size]`."""
    x = x + self.attention(self.norm_attention(x))
    return x + self.mlp(self.norm_mlp(x))


class Decoder(nnx.Module):
  """A language model that predicts each token from those before it.

  With tied embeddings the last product, `nnx.Embed.attend`, is a searched layer, while
  rows that are looked up stay as they are, which multiplies nothing.

  Args:
    vocabulary_size: values of a token.
    hidden_size: channels of a token.
    depth: the number of blocks.
    num_heads: of the queries.
    num_kv_heads: of keys and values, each for as many of the queries.
    head_size: channels of a head, an even number.
    mlp_size: channels within a perceptron, or within one expert.
    width: multiplies `hidden_size` and `mlp_size`.
    activation: of the gates, one of `ACTIVATIONS`.
    rotary_base: of the positions' angles.
    norm_epsilon: added to the mean squares of the normalisation.
    tied: whether the last layer multiplies by the embeddings.
    scales_embedding: whether embeddings are multiplied by √hidden_size, as Gemma's.
    num_experts: in the place of each perceptron; 0 for one perceptron alone.
    experts_per_token: those that compute a token.
    capacity_factor: places of an expert, in multiples of the tokens that it gets on
      average.
    remat: whether blocks are computed again for their gradients, which then need the
      memory of one block.
    dtype: of the computation.
    rngs: for the weights.

  Raises:
    ConfigError: where sizes do not fit together.
  """

  def __init__(
    self,
    *,
    vocabulary_size: int,
    hidden_size: int,
    depth: int,
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    mlp_size: int,
    width: float = 1.0,
    activation: str = 'silu',
    rotary_base: float = 10_000.0,
    norm_epsilon: float = 1e-6,
    tied: bool = True,
    scales_embedding: bool = False,
    num_experts: int = 0,
    experts_per_token: int = 2,
    capacity_factor: float = 1.25,
    remat: bool = False,
    dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
  ):
    """Draws the weights, float32; the class describes the arguments."""
    hidden_size, mlp_size = round(width * hidden_size), round(width * mlp_size)
    _check_sizes(hidden_size, mlp_size, num_heads, num_kv_heads, head_size)
    function = _activation(activation)
    self.scale = math.sqrt(hidden_size) if scales_embedding else 1.0
    self.remat = remat
    initializer = nnx.initializers.normal(hidden_size**-0.5)
    self.embedding = nnx.Embed(
      vocabulary_size, hidden_size, embedding_init=initializer, dtype=dtype, rngs=rngs
    )

    def make_mlp():
      if not num_experts:
        return GatedMLP(hidden_size, mlp_size, function, dtype, rngs=rngs)
      return Experts(
        hidden_size, mlp_size, num_experts, experts_per_token, capacity_factor,
        function, dtype, rngs=rngs,
      )  # fmt: skip

    def make_attention():
      return Attention(
        hidden_size, num_heads, num_kv_heads, head_size, rotary_base, dtype, rngs=rngs
      )

    def make_norm():
      return nnx.RMSNorm(hidden_size, epsilon=norm_epsilon, dtype=dtype, rngs=rngs)

    self.blocks = nnx.List(
      Block(make_norm, make_attention(), make_mlp()) for _ in range(depth)
    )
    self.norm = make_norm()
    self.tied = tied
    if not tied:
      self.head = nnx.Linear(
        hidden_size, vocabulary_size, use_bias=False, dtype=dtype, rngs=rngs
      )

  def __call__(self, tokens: jax.Array, train: bool = False) -> jax.Array:
    """Returns the logits of each next token, float32[B, T, vocabulary_size].

    Args:
      tokens: int32[B, T].
      train: of no effect, since nothing differs in training.

    Raises:
      ConfigError: where the tokens are no whole numbers `[B, T]`.
    """
    del train
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
      raise ConfigError(
        f'{tokens.dtype}{list(tokens.shape)}: expected whole numbers [B, T], which '
        'input.context makes of a text'
      )
    x = self.embedding(tokens) * self.scale
    call = nnx.remat(lambda block, x: block(x)) if self.remat else Block.__call__
    for block in self.blocks:
      x = call(block, x)
    x = self.norm(x)
    logits = self.embedding.attend(x) if self.tied else self.head(x)
    return logits.astype(jnp.float32)

  def num_params(self, active: bool = False) -> int:
    """Returns the number of parameters.

    Args:
      active: whether to leave out the experts that a token does without.
    """
    sizes = lambda module: sum(
      math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(module, nnx.Param))
    )
    total = sizes(self)
    for block in self.blocks if active else ():
      if isinstance(block.mlp, Experts):
        idle = 1 - block.mlp.experts_per_token / block.mlp.num_experts
        total -= round(idle * (sizes(block.mlp) - sizes(block.mlp.router)))
    return total


def _activation(name):
  if name not in ACTIVATIONS:
    raise ConfigError(not_among(f'activation={name!r}', name, ACTIVATIONS))
  return ACTIVATIONS[name]


def _check_sizes(hidden_size, mlp_size, num_heads, num_kv_heads, head_size):
  if min(hidden_size, mlp_size) < 1:
    raise ConfigError(
      f'hidden_size {hidden_size} and mlp_size {mlp_size} at this width: expected '
      'numbers above 0'
    )
  if num_kv_heads < 1 or num_heads % num_kv_heads:
    raise ConfigError(
      f'num_heads={num_heads}: expected a multiple of num_kv_heads={num_kv_heads}'
    )
  if head_size % 2:
    raise ConfigError(
      f'head_size={head_size}: expected an even number, whose pairs are rotated'
    )
