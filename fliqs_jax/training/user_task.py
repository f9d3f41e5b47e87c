"""A user's own task: what feeds the network, and what its outputs are worth."""

from collections.abc import Callable, Mapping
import inspect
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fliqs_jax.errors import ConfigError, not_among
from fliqs_jax.training.classification import classification, mean_loss
from fliqs_jax.training.task import Batch, Metrics, Score, Task, score_problem
from fliqs_jax.training.train_state import Arguments

# How networks name the flag of their call that tells training, and its value then.
_TRAIN_FLAGS = {
  'train': True, 'training': True, 'is_training': True, 'deterministic': False
}  # fmt: skip


def make_task(
  model: nn.Module,
  loss: Score | None = None,
  quality: Score | None = None,
  metrics: Callable[[Any, Batch], Metrics] | None = None,
  inputs: str | Callable[[Batch], Any] = 'image',
) -> Task:
  """Returns the task of a user's own network and batches.

  Args:
    model: the network, whose call may take one of the flags `train`, `training`,
      `is_training` and `deterministic`.
    loss: what training minimises, of (outputs, batch): a mean over the batch, or a
      value for each example. By default the cross entropy of logits and
      `batch['label']`.
    quality: what the search rewards, in the same form; by default minus the loss.
    metrics: what else is logged and evaluated, a dict of such values.
    inputs: the entry of a batch that the network is called with, or a function from a
      batch to its argument or to the tuple of its arguments.
  """
  classifier = classification()
  task = classifier._replace(
    loss=loss or _default_loss,
    quality=quality or _minus(loss or _default_loss),
    arguments=_arguments(model, inputs),
    mask=None,
  )
  if loss or quality:

    def scores(outputs, batch):
      return {
        'loss': task.loss(outputs, batch),
        'quality': task.quality(outputs, batch),
      }

    return task._replace(
      metrics=metrics or _no_metrics, evaluation=_together(scores, metrics)
    )
  return task._replace(
    metrics=_together(classifier.metrics, metrics),
    evaluation=_together(classifier.evaluation, metrics),
  )


def _no_metrics(outputs, batch):
  del outputs, batch
  return {}


def _together(own, more):
  """Returns the function to the values of two."""
  if more is None:
    return own
  return lambda outputs, batch: {**own(outputs, batch), **more(outputs, batch)}


def _default_loss(logits, batch):
  """Returns the classifier's loss, or says what it expects of outputs and batch."""
  labels = batch.get('label') if isinstance(batch, Mapping) else None
  shape = getattr(logits, 'shape', ())
  if getattr(labels, 'shape', None) not in (shape[:-1], shape)[: len(shape)]:
    raise ConfigError(
      "the default loss takes logits [B, ..., classes] and batch['label'], [B, ...] "
      f'or as the logits, found {_shapes(logits)} and {_shapes(labels)}: expected '
      'loss=... for anything else'
    )
  return mean_loss(logits, batch)


def _shapes(tree):
  return jax.tree.map(jnp.shape, tree)


def _minus(loss):
  return lambda outputs, batch: jax.tree.map(jnp.negative, loss(outputs, batch))


def _arguments(model, inputs):
  """Returns the function from (batch, train) to what the network is called with."""
  taken = inspect.signature(type(model).__call__).parameters
  flags = {name: value for name, value in _TRAIN_FLAGS.items() if name in taken}

  def arguments(batch: Batch, train: bool) -> Arguments:
    args = _entry(batch, inputs) if isinstance(inputs, str) else inputs(batch)
    return Arguments(
      args if isinstance(args, tuple) else (args,),
      {name: value == train for name, value in flags.items()},
    )

  return arguments


def _entry(batch, name):
  if not isinstance(batch, Mapping):
    raise ConfigError(
      f'the network is fed from {name!r}, and a batch is no dict: expected dicts of '
      'arrays, or a function as inputs'
    )
  if name not in batch:
    given = f'the network is fed from {name!r}, which a batch lacks'
    raise ConfigError(
      not_among(given, name, batch, f'inputs to name one of {", ".join(batch)}')
    )
  return batch[name]


def check(
  model: nn.Module, task: Task, default_loss: bool, batch: Batch, evaluated: Batch
) -> None:
  """Checks, by tracing, that a network and its task fit batches `[B, ...]`.

  Args:
    model: the searchable network.
    task: from `make_task`.
    default_loss: whether labels must be classes, as the default loss has it.
    batch: for training.
    evaluated: for the evaluation; of another size, maybe.

  Raises:
    ConfigError: where they return what a search cannot use.
  """

  def forward(batch, evaluated):
    example = task.arguments(batch, False)
    variables = model.init(jax.random.key(0), *example.args, **example.kwargs)
    call = task.arguments(batch, True)
    collections = [name for name in variables if name != 'params']
    key = jax.random.key(0)
    outputs, updated = model.apply(
      variables,
      *call.args,
      mutable=collections,
      rngs={'params': key, 'dropout': key},
      **call.kwargs,
    )
    values = {
      'loss': task.loss(outputs, batch),
      'quality': task.quality(outputs, batch),
      **task.metrics(outputs, batch),
    }
    call = task.arguments(evaluated, False)
    outputs = model.apply(variables, *call.args, **call.kwargs)
    found = values, task.evaluation(outputs, evaluated)
    logits = outputs if default_loss else None
    return found, logits, {name: variables[name] for name in collections}, updated

  found, logits, before, after = jax.eval_shape(forward, batch, evaluated)
  problems = []
  if logits is not None:
    problems += _label_problems(logits.shape[-1], batch['label'], evaluated['label'])
  for values, given in zip(found, (batch, evaluated)):
    size = jax.tree.leaves(given)[0].shape[0]
    for name, value in values.items():
      problem = score_problem(name, _shapes(value), size)
      problems += [problem] if problem else []
  shapes = lambda tree: jax.tree.map(lambda a: (a.shape, a.dtype), tree)
  problems += [
    f'the network changes the shape of its collection {name!r} as it is called: '
    'expected the shapes that `init` makes; what is sown belongs in `intermediates`'
    for name in before
    if shapes(before[name]) != shapes(after.get(name))
  ]
  if problems:
    raise ConfigError(*dict.fromkeys(problems))


def _label_problems(num_classes, *labels):
  """Says where integer labels are none of the classes, which the loss passes over."""
  return [
    f"batch['label'] holds {label}: expected classes from 0 to {num_classes - 1}, as "
    f'the network has {num_classes} outputs'
    for given in labels
    if np.issubdtype(given.dtype, np.integer)
    for label in (given.min(), given.max())
    if not 0 <= label < num_classes
  ]
