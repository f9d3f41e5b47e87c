"""The task of masked language modelling: hidden bytes of a text from all others.

15 % of the bytes are hidden, as by BERT (Devlin et al., 2018, arXiv 1810.04805), those
of a text always the same ones, drawn from a hash of it.
"""

import jax
import jax.numpy as jnp
import optax

from fliqs_jax.training import language_modelling
from fliqs_jax.training.language_modelling import PADDING
from fliqs_jax.training.task import Batch, Task
from fliqs_jax.training.train_state import Arguments

MASK = 26  # the byte in the place of a hidden one: SUB, `substitute`, in ASCII
_SHARE = 0.15


def is_hidden(tokens: jax.Array) -> jax.Array:
  """Returns which bytes of texts are hidden, bool[B, T].

  Args:
    tokens: integer [B, T], of which padding is never hidden.
  """
  places = jnp.arange(1, tokens.shape[1] + 1, dtype=jnp.uint32)
  hashes = jnp.sum(tokens.astype(jnp.uint32) * places, axis=1)

  def draw(value):
    key = jax.random.fold_in(jax.random.key(0), value)
    return jax.random.bernoulli(key, _SHARE, tokens.shape[1:])

  return jax.vmap(draw)(hashes) & (tokens != PADDING)


def cross_entropy(logits: jax.Array, batch: Batch) -> jax.Array:
  """Returns the mean cross entropy of each text's hidden bytes in nats, float32[B].

  Args:
    logits: float32[B, context, num_classes].
    batch: `tokens: [B, context + 1]`, of which the last one is not used.
  """
  tokens = batch['tokens'][:, :-1].astype(jnp.int32)
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens)
  hidden = is_hidden(tokens)
  return jnp.sum(losses * hidden, axis=-1) / jnp.maximum(jnp.sum(hidden, axis=-1), 1)


def masked_language_modelling(quality: str = 'minus_bits_per_byte') -> Task:
  """Returns the task of a model of bytes that sees both sides of each.

  Args:
    quality: one of `language_modelling.QUALITIES`, here of the bytes that are hidden.
  """
  return language_modelling.of_bytes(cross_entropy, quality)._replace(
    arguments=_arguments
  )


def _arguments(batch, train):
  tokens = batch['tokens'][:, :-1].astype(jnp.int32)
  return Arguments((jnp.where(is_hidden(tokens), MASK, tokens),), {'train': train})
