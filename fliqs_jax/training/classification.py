"""The task of classification, of classes or of their probabilities."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fliqs_jax.training.task import Batch, Metrics, Task

_TOLERANCE = 0.02  # of sums of probabilities, which may be in bfloat16


def accuracy(logits: jax.Array, batch: Batch) -> jax.Array:
  """Returns the fraction of examples whose largest logit is at the likeliest label."""
  return jnp.mean(is_correct(logits, batch['label']))


def is_correct(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """Returns whether each example's largest logit is at the likeliest label, bool[B]."""
  if _are_probabilities(labels, logits.shape):
    labels = jnp.argmax(labels, axis=-1)
  return jnp.argmax(logits, axis=-1) == labels


def _are_probabilities(labels, shape):
  """Returns whether labels of logits of a shape are probabilities of all classes."""
  return labels.ndim == len(shape)


def label_problem(labels: np.ndarray, shape: tuple[int, ...]) -> str | None:
  """Returns what is wrong with a batch's labels, one line; None where nothing is.

  Args:
    labels: of a batch, on the host.
    shape: of the logits, `[B, ..., num_classes]`.
  """
  labels, num_classes = np.asarray(labels, np.float64), shape[-1]
  if _are_probabilities(labels, shape):
    wrong = labels[(labels < 0).any(-1) | ~(np.abs(labels.sum(-1) - 1) < _TOLERANCE)]
    expected = f'probabilities of the {num_classes} classes, which sum to 1'
  else:
    wrong = labels[~((labels >= 0) & (labels < num_classes) & (labels % 1 == 0))]
    expected = (
      f'classes from 0 to {num_classes - 1}, as the network has {num_classes} outputs'
    )
  if not wrong.size:
    return None
  found = ', '.join(f'{value:g}' for value in np.atleast_1d(wrong[0])[:8])
  return f"batch['label'] holds {found}: expected {expected}"


def cross_entropy(
  logits: jax.Array, labels: jax.Array, label_smoothing: float = 0.0
) -> jax.Array:
  """Returns the softmax cross entropy of each example, float32[B].

  Args:
    logits: float32[B, num_classes].
    labels: classes, int32[B], or probabilities, [B, num_classes], as one-hot rows.
    label_smoothing: the probability that is spread over all classes.
  """
  if not _are_probabilities(labels, logits.shape):
    labels = jax.nn.one_hot(labels.astype(jnp.int32), logits.shape[-1])
  elif not jnp.issubdtype(labels.dtype, jnp.floating):
    labels = labels.astype(jnp.float32)
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
