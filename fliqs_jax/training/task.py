"""Objectives: what training minimises, the search rewards, and a run reports."""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fliqs_jax.training.train_state import Arguments

Batch = dict[str, Any]
Metrics = dict[str, jax.Array]


def image_arguments(batch: Batch, train: bool) -> Arguments:
  """Returns what the networks of `models` are called with."""
  return Arguments((batch['image'],), {'train': train})


class Objective(NamedTuple):
  """What training minimises and what the search rewards, of one batch.

  Each function is of `(outputs, batch)`. Its values are means over examples, `[]`, or
  those of the examples, `[B, ...]`, which are averaged.
  """

  loss: Callable[[Any, Batch], jax.Array]
  quality: Callable[[Any, Batch], jax.Array]
  metrics: Callable[[Any, Batch], Metrics]  # what else is logged
  evaluation: Callable[[Any, Batch], Metrics]  # what an evaluation averages
  arguments: Callable[[Batch, bool], Arguments] = image_arguments  # (batch, train)
  # Which examples of a batch an evaluation counts, bool[B]; None for all.
  mask: Callable[[Batch], jax.Array] | None = None
  # Of the same loss of outputs that a network sows, in training, as `aux_logits` into
  # the collection `intermediates`. Inception-v3's authors take 0.4 (TF-slim).
  auxiliary_weight: float = 0.4
  # What training does to a sample's batch first; the key is consumed.
  augment: Callable[[Batch, jax.Array], Batch] = lambda batch, key: batch


def accuracy(logits: jax.Array, batch: Batch) -> jax.Array:
  """Returns the fraction of examples whose largest logit is at the likeliest label."""
  return jnp.mean(is_correct(logits, batch['label']))


def is_correct(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """Returns whether each example's largest logit is at the likeliest label, bool[B]."""
  if _are_probabilities(labels):
    labels = jnp.argmax(labels, axis=-1)
  return jnp.argmax(logits, axis=-1) == labels


def _are_probabilities(labels):
  return jnp.issubdtype(labels.dtype, jnp.floating)


def cross_entropy(
  logits: jax.Array, labels: jax.Array, label_smoothing: float = 0.0
) -> jax.Array:
  """Returns the softmax cross entropy of each example, float32[B].

  Args:
    logits: float32[B, num_classes].
    labels: classes, int32[B], or probabilities, float32[B, num_classes].
    label_smoothing: the probability that is spread over all classes.
  """
  if not _are_probabilities(labels):
    labels = jax.nn.one_hot(labels, logits.shape[-1])
  return optax.softmax_cross_entropy(
    logits, optax.smooth_labels(labels, label_smoothing)
  )


def classification(
  quality: str = 'accuracy',
  label_smoothing: float = 0.0,
  auxiliary_weight: float = 0.4,
) -> Objective:
  """Returns the objective of a classifier.

  Args:
    quality: `accuracy`, or `minus_loss`, without label smoothing.
    label_smoothing: of the training loss.
    auxiliary_weight: of the loss of auxiliary heads.
  """

  def mean_loss(logits, batch, smoothing):
    return jnp.mean(cross_entropy(logits, batch['label'], smoothing))

  return Objective(
    loss=functools.partial(mean_loss, smoothing=label_smoothing),
    quality=accuracy
    if quality == 'accuracy'
    else lambda logits, batch: -mean_loss(logits, batch, 0.0),
    metrics=lambda logits, batch: {'accuracy': accuracy(logits, batch)},
    evaluation=lambda logits, batch: {
      'accuracy': is_correct(logits, batch['label']),
      'loss': cross_entropy(logits, batch['label']),
    },
    mask=lambda batch: batch['mask'],
    auxiliary_weight=auxiliary_weight,
  )
