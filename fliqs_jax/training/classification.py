"""The task of classification, of classes or of their probabilities."""

import functools

import jax
import jax.numpy as jnp
import optax

from fliqs_jax.training.task import Batch, Metrics, Task


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


def mean_loss(
  logits: jax.Array, batch: Batch, label_smoothing: float = 0.0
) -> jax.Array:
  """Returns the mean cross entropy of a batch, float32[]."""
  return jnp.mean(cross_entropy(logits, batch['label'], label_smoothing))


def minus_loss(logits: jax.Array, batch: Batch) -> jax.Array:
  """Returns minus the mean cross entropy, without label smoothing, float32[]."""
  return -mean_loss(logits, batch)


QUALITIES = {'accuracy': accuracy, 'minus_loss': minus_loss}


def classification(
  quality: str = 'accuracy',
  label_smoothing: float = 0.0,
  auxiliary_weight: float = 0.4,
) -> Task:
  """Returns the task of a classifier.

  Args:
    quality: one of `QUALITIES`.
    label_smoothing: of the training loss.
    auxiliary_weight: of the loss of auxiliary heads.
  """
  return Task(
    loss=functools.partial(mean_loss, label_smoothing=label_smoothing),
    quality=QUALITIES[quality],
    metrics=_metrics,
    evaluation=_evaluation,
    mask=_mask,
    auxiliary_weight=auxiliary_weight,
  )


def _metrics(logits, batch) -> Metrics:
  return {'accuracy': accuracy(logits, batch)}


def _evaluation(logits, batch) -> Metrics:
  return {
    'accuracy': is_correct(logits, batch['label']),
    'loss': cross_entropy(logits, batch['label']),
  }


def _mask(batch):
  return batch['mask']
