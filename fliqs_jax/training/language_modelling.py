"""The task of language modelling: each byte of a text from those before it."""

import math

import jax
import jax.numpy as jnp
import optax

from fliqs_jax.training.task import Batch, Score, Task
from fliqs_jax.training.train_state import Arguments

PADDING = 0  # the byte that stands for those that a short text lacks; not predicted


def cross_entropy(logits: jax.Array, batch: Batch) -> jax.Array:
  """Returns the mean cross entropy of each window's bytes in nats, float32[B].

  Args:
    logits: float32[B, context, num_classes], of each window but its last byte.
    batch: `tokens: [B, context + 1]`.
  """
  targets = batch['tokens'][:, 1:].astype(jnp.int32)
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
  counted = targets != PADDING
  num_counted = jnp.maximum(jnp.sum(counted, axis=-1), 1)
  return jnp.sum(losses * counted, axis=-1) / num_counted


QUALITIES = ('minus_bits_per_byte',)


def language_modelling(quality: str = 'minus_bits_per_byte') -> Task:
  """Returns the task of a language model of bytes.

  Args:
    quality: one of `QUALITIES`.
  """
  return of_bytes(cross_entropy, quality)


def of_bytes(loss: Score, quality: str) -> Task:
  """Returns the task of predicting bytes, those after each unless it is replaced.

  Args:
    loss: the mean cross entropy of the predicted bytes of each text, in nats.
    quality: one of `QUALITIES`.
  """
  bits = lambda logits, batch: loss(logits, batch) / math.log(2)
  qualities = {'minus_bits_per_byte': lambda logits, batch: -bits(logits, batch)}
  return Task(
    loss=loss,
    quality=qualities[quality],
    metrics=lambda logits, batch: {'bits_per_byte': bits(logits, batch)},
    evaluation=lambda logits, batch: {
      'bits_per_byte': bits(logits, batch),
      'loss': loss(logits, batch),
    },
    arguments=_arguments,
    mask=lambda batch: batch['mask'],
  )


def _arguments(batch, train):
  # Each window's last byte has nothing after it to predict.
  return Arguments((batch['tokens'][:, :-1].astype(jnp.int32),), {'train': train})
