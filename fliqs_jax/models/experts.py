"""Experts: gated perceptrons, of which a router picks a few for each token.

The router takes the best k experts of a token and a softmax over their scores, as
Mixtral (Jiang et al., 2024, arXiv 2401.04088). Each expert has as many places for the
tokens of a text as it is to get on average, times a factor (Fedus et al., 2021, arXiv
2101.03961, equation 3), so that shapes are static and what is computed is that of the
active experts alone. Places go to earlier tokens first: no token depends on later ones.
A token that finds no place in an expert goes without it.
"""

import math

from flax import nnx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from fliqs_jax.errors import ConfigError

# Each expert is drawn as a layer of its own.
_init = nnx.initializers.lecun_normal(batch_axis=(0,))


class Experts(nnx.Module):
  """E gated perceptrons and their router."""

  def __init__(
    self,
    hidden_size: int,
    mlp_size: int,
    num_experts: int,
    experts_per_token: int,
    capacity_factor: float,
    activation,
    dtype: DTypeLike,
    *,
    rngs: nnx.Rngs,
  ):
    """The arguments are those of `decoder.Decoder`.

    Raises:
      ConfigError: where a token is to have more experts than there are.
    """
    if not 1 <= experts_per_token <= num_experts:
      raise ConfigError(
        f'experts_per_token={experts_per_token}: expected one from 1 to '
        f'num_experts={num_experts}'
      )
    self.num_experts = num_experts
    self.experts_per_token = experts_per_token
    self.capacity_factor = capacity_factor
    self.activation = activation
    self.router = nnx.Linear(
      hidden_size, num_experts, use_bias=False, dtype=dtype, rngs=rngs
    )

    def einsum(equation, *sizes):
      shape = num_experts, *sizes
      return nnx.Einsum(equation, shape, kernel_init=_init, dtype=dtype, rngs=rngs)

    self.gate = einsum('becd,edf->becf', hidden_size, mlp_size)
    self.up = einsum('becd,edf->becf', hidden_size, mlp_size)
    self.down = einsum('becf,efd->becd', mlp_size, hidden_size)

  def __call__(self, x: jax.Array) -> jax.Array:
    """`[B, T, hidden_size] -> [B, T, hidden_size]`."""
    scores = self.router(x).astype(jnp.float32)
    scores, chosen = jax.lax.top_k(scores, self.experts_per_token)
    weights = jax.nn.softmax(scores)
    places, capacity = self._places(chosen)
    gathered = jax.vmap(self._dispatch, in_axes=(0, 0, None))(x, places, capacity)
    y = self.down(self.activation(self.gate(gathered)) * self.up(gathered))
    y = y.reshape(len(y), -1, y.shape[-1])
    # [B, T, k, hidden_size]; zero where a token found no place
    taken = jax.vmap(lambda rows, at: rows.at[at].get(mode='fill', fill_value=0))
    return jnp.sum(taken(y, places) * weights[..., None].astype(x.dtype), axis=2)

  def _places(self, chosen):
    """Returns the place of each choice, int32[B, T, k], and the places of an expert.

    Places are numbered through all experts; one beyond the last is none.
    """
    batch, tokens, count = chosen.shape
    average = tokens * count / self.num_experts
    capacity = min(math.ceil(average * self.capacity_factor), tokens)
    flat = chosen.reshape(batch, -1)
    asked = jax.nn.one_hot(flat, self.num_experts, dtype=jnp.int32)
    earlier = jnp.cumsum(asked, axis=1) - asked
    rank = jnp.sum(earlier * asked, axis=-1)
    none = self.num_experts * capacity
    places = jnp.where(rank < capacity, flat * capacity + rank, none)
    return places.reshape(chosen.shape), capacity

  def _dispatch(self, x, places, capacity):
    """Returns the tokens of one text by expert, `[E, capacity, hidden_size]`."""
    tokens, hidden = x.shape
    rows = jnp.repeat(x, self.experts_per_token, axis=0)
    empty = jnp.zeros((self.num_experts * capacity, hidden), x.dtype)
    filled = empty.at[places.ravel()].set(rows, mode='drop')
    return filled.reshape(self.num_experts, capacity, hidden)
