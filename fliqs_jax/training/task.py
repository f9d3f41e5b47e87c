"""Tasks: what a network is fed, what training minimises, and what a search rewards."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from fliqs_jax.training.train_state import Arguments

Batch = dict[str, Any]  # arrays [B, ...]
Metrics = dict[str, jax.Array]
Score = Callable[[Any, Batch], jax.Array]  # (outputs, batch) -> [] or [B, ...]


def image_arguments(batch: Batch, train: bool) -> Arguments:
  """Returns the arguments of the networks of `models`."""
  return Arguments((batch['image'],), {'train': train})


def unchanged(batch: Batch, key: jax.Array) -> Batch:
  """Returns the batch as it is: the augmentation of a task that has none."""
  del key
  return batch


def accept(batch: Batch) -> None:
  """Accepts any batch: the check of a task that knows nothing of its values."""
  del batch


class Task(NamedTuple):
  """The task that a network is trained for.

  Values of functions of `(outputs, batch)` are means over examples, `[]`, or those of
  the examples, `[B, ...]`, which are averaged.

  Attributes:
    loss: what training minimises, of (outputs, batch).
    quality: what the search rewards, of (outputs, batch).
    metrics: what else is logged, a dict of such values.
    evaluation: what an evaluation averages, a dict of such values.
    arguments: (batch, train) -> the arguments that the network is called with.
    mask: batch -> bool[B], which examples an evaluation counts; None for all.
    auxiliary_weight: of the same loss of outputs that a network sows, in training, as
      `aux_logits` into the collection `intermediates`. Inception-v3's authors take 0.4
      (TF-slim).
    augment: (batch, key) -> the batch that a sample trains on; the key is consumed.
    check: raises ConfigError where a batch, in numpy, holds what the task cannot use.
  """

  loss: Score
  quality: Score
  metrics: Callable[[Any, Batch], Metrics]
  evaluation: Callable[[Any, Batch], Metrics]
  arguments: Callable[[Batch, bool], Arguments] = image_arguments
  mask: Callable[[Batch], jax.Array] | None = None
  auxiliary_weight: float = 0.4
  augment: Callable[[Batch, jax.Array], Batch] = unchanged
  check: Callable[[Batch], None] = accept


def score_problem(name: str, shape: Any, size: int, mean: bool = True) -> str | None:
  """Returns what is wrong with the shape of a score, one line; None where nothing is.

  Args:
    name: of the score.
    shape: of its value, which a user's function gave.
    size: examples in the batch.
    mean: whether `[]` will do, where every example counts.
  """
  if isinstance(shape, tuple):
    if shape[:1] == (size,) or (mean and shape == ()):
      return None
  expected = f'{"[], the mean, or " if mean else ""}[{size}, ...], a value for each'
  return f'{name} has shape {shape} for a batch of {size} examples: expected {expected}'
