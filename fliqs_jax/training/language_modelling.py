"""The task of language modelling: each byte of a text from those before it."""

import math

import jax
import jax.numpy as jnp
import optax

from fliqs_jax.training.task import Batch, Metrics, Task
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


def bits_per_byte(logits: jax.Array, batch: Batch) -> jax.Array:
  """Returns the mean cross entropy of each window's bytes in bits, float32[B]."""
  return cross_entropy(logits, batch) / math.log(2)


def minus_bits_per_byte(logits: jax.Array, batch: Batch) -> jax.Array:
  """Returns minus the mean cross entropy of each window's bytes in bits, float32[B]."""
  return -bits_per_byte(logits, batch)


QUALITIES = {'minus_bits_per_byte': minus_bits_per_byte}


def language_modelling(quality: str = 'minus_bits_per_byte') -> Task:
  """Returns the task of a language model of bytes.

  Args:
    quality: one of `QUALITIES`.
  """
  return Task(
    loss=cross_entropy,
    quality=QUALITIES[quality],
    metrics=_metrics,
    evaluation=_evaluation,
    arguments=_arguments,
    mask=lambda batch: batch['mask'],
  )


def _arguments(batch, train):
  # Each window's last byte has nothing after it to predict.
  return Arguments((batch['tokens'][:, :-1].astype(jnp.int32),), {'train': train})


def _metrics(logits, batch) -> Metrics:
  return {'bits_per_byte': bits_per_byte(logits, batch)}


def _evaluation(logits, batch) -> Metrics:
  return {
    'bits_per_byte': bits_per_byte(logits, batch),
    'loss': cross_entropy(logits, batch),
  }
