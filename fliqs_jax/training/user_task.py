"""A user's own task: what feeds the network, and what its outputs are worth."""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import functools
import inspect
from typing import Any

from flax import errors as flax_errors
from flax import linen as nn
from flax import nnx
import jax
import jax.numpy as jnp

from fliqs_jax.errors import ConfigError, not_among
from fliqs_jax.training.classification import classification, label_problem, mean_loss
from fliqs_jax.training.task import Batch, Metrics, Score, Task, score_problem
from fliqs_jax.training.train_state import Arguments, plain

# How networks name the flag of their call that tells training, and its value then.
_TRAIN_FLAGS = {
  'train': True, 'training': True, 'is_training': True, 'deterministic': False,
  'use_running_average': False,
}  # fmt: skip
_HOW_TO_CALL = (
  f'expected a network with one of the flags {", ".join(_TRAIN_FLAGS)}, which tell it '
  'training from evaluation, or else inputs=..., a function (batch) or (batch, train) '
  'that returns all arguments: an array, a tuple, or a pair (args, kwargs)'
)
# Names in a history or an evaluation that a user's metric cannot have.
_TAKEN_NAMES = (
  'step', 'policy', 'loss', 'quality', 'num_examples', 'reward', 'cost', 'cost_ratio',
  'gradient_norm', 'learning_rate', 'sample_loss', 'choices', 'skipped_in_a_row',
  'skipped_steps', 'entropy', 'entropy_weight', 'baseline', 'temperature', 'budget',
)  # fmt: skip


def make_task(
  model: nn.Module,
  loss: Score | None = None,
  quality: Score | None = None,
  metrics: Callable[[Any, Batch], Metrics] | None = None,
  inputs: str | Callable[[Batch], Any] = 'image',
) -> Task:
  """Returns the task of a user's own network and batches.

  Args:
    model: the network, whose call may take flags of `_TRAIN_FLAGS`.
    loss: what training minimises, of (outputs, batch): a mean over the batch, or a
      value for each example. By default the cross entropy of logits and
      `batch['label']`.
    quality: what the search rewards, in the same form; by default minus the loss.
    metrics: what else is logged and evaluated, a dict of such values.
    inputs: the entry of a batch that the network is called with, or a function from a
      batch, or from (batch, train), to its argument, the tuple of its arguments, or a
      pair (args, kwargs), a tuple and a dict. What it gives wins over the flag.
  """
  for name, function in (('loss', loss), ('quality', quality), ('metrics', metrics)):
    _check_function(name, function)
  classifier = classification()
  task = classifier._replace(
    loss=_real(loss) if loss else _default_loss,
    quality=quality or _minus(_real(loss) if loss else _default_loss),
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
      metrics=_together(_no_metrics, metrics), evaluation=_together(scores, metrics)
    )
  return task._replace(
    metrics=_together(classifier.metrics, metrics),
    evaluation=_together(classifier.evaluation, metrics),
  )


def _check_function(name, function):
  """Raises ConfigError where a score is no function of outputs and batch."""
  expected = 'expected a function of (outputs, batch)'
  if function is None:
    return
  if not callable(function):
    raise ConfigError(f'{name}={function!r}: {expected}')
  try:
    inspect.signature(function).bind(None, None)
  except TypeError as error:
    raise ConfigError(f'{name} is a function with {error}: {expected}') from None
  except ValueError:  # of a builtin, which tells no signature
    pass


def _real(loss):
  """Returns a loss that says so where its values have no gradient."""

  def checked(outputs, batch):
    value = loss(outputs, batch)
    for leaf in jax.tree.leaves(value):
      kind = type(leaf).__name__
      with contextlib.suppress(TypeError):
        kind = jnp.result_type(leaf)
        if jnp.issubdtype(kind, jnp.inexact):
          continue
      raise ConfigError(
        f'loss returns {kind}: expected real numbers, which have a gradient'
      )
    return value

  return checked


def _no_metrics(outputs, batch):
  del outputs, batch
  return {}


def _together(own, more):
  """Returns the function to the values of two."""
  if more is None:
    return own

  def together(outputs, batch):
    values, added = own(outputs, batch), more(outputs, batch)
    if not isinstance(added, Mapping) or not all(isinstance(n, str) for n in added):
      raise ConfigError(
        f'metrics returns {added!r}: expected a dict of values by their names'
      )
    if taken := [name for name in added if name in (*values, *_TAKEN_NAMES)]:
      raise ConfigError(
        f'metrics returns {", ".join(map(repr, taken))}, which a run records itself: '
        'expected other names'
      )
    return {**values, **added}

  return together


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
  """Returns the shapes in a tree, and of what has none the name of its class."""

  def shape(leaf):
    if hasattr(leaf, 'shape') or isinstance(leaf, int | float | complex):
      return jnp.shape(leaf)
    return type(leaf).__name__

  return jax.tree.map(shape, tree)


def _minus(loss):
  return lambda outputs, batch: jax.tree.map(jnp.negative, loss(outputs, batch))


def _arguments(model, inputs):
  """Returns the function from (batch, train) to what the network is called with."""
  # A class, given in place of an instance, is refused later, with a line of its own.
  is_searchable = not isinstance(model, nn.Module | nnx.Module | type)
  module = model.model if is_searchable else model
  call = inspect.signature(type(module).__call__)
  give = _giver(inputs)

  def arguments(batch: Batch, train: bool) -> Arguments:
    args, kwargs = give(batch, train)
    for leaf in jax.tree.leaves(args):
      if not hasattr(leaf, 'shape'):
        raise ConfigError(
          f'inputs gives {leaf!r} as an argument: expected arrays; all else is given '
          'by its name, in the second of a pair (args, kwargs)'
        )
    try:
      given = call.bind_partial(module, *args, **kwargs).arguments
      flags = {
        name: value == train
        for name, value in _TRAIN_FLAGS.items()
        if name in call.parameters and name not in given
      }
      call.bind(module, *args, **kwargs, **flags)
    except TypeError as error:
      name = type(module).__name__
      raise ConfigError(
        f'the call of {name}, {name}{call}, does not fit its arguments ({error}): '
        f'{_HOW_TO_CALL}'
      ) from None
    if not jax.tree.leaves((args, kwargs)):
      raise ConfigError(
        f'inputs gives {args!r} to the network: expected arrays of the batch'
      )
    return Arguments(args, {**kwargs, **flags})

  return arguments


def _giver(inputs):
  """Returns the function from (batch, train) to the pair (args, kwargs)."""

  def pair(given):
    if isinstance(given, tuple) and [*map(type, given)] == [tuple, dict]:
      return given
    return (given if isinstance(given, tuple) else (given,)), {}

  if isinstance(inputs, str):
    return lambda batch, train: pair(_entry(batch, inputs))
  if not callable(inputs):
    raise ConfigError(
      f'inputs={inputs!r}: expected the name of an entry of a batch, or a function of '
      '(batch) or (batch, train)'
    )
  try:
    signature = inspect.signature(inputs)
  except ValueError:  # of a builtin, which tells none
    return lambda batch, train: pair(inputs(batch))
  for given in ((None, None), (None,)):
    with contextlib.suppress(TypeError):
      signature.bind(*given)
      return lambda batch, train: pair(inputs(*(batch, train)[: len(given)]))
  raise ConfigError(
    f'inputs is a function of {signature}: expected one of (batch) or (batch, train)'
  )


def _entry(batch, name):
  if not isinstance(batch, Mapping):
    raise ConfigError(
      f'the network is fed from {name!r}, and a batch is no dict: expected dicts of '
      'arrays, or a function as inputs'
    )
  if name not in batch:
    given = f'the network is fed from {name!r}, which a batch lacks'
    raise ConfigError(
      not_among(
        given, name, batch, f'inputs to name one of {", ".join(map(str, batch))}'
      )
    )
  return batch[name]


def check(
  model: nn.Module, task: Task, default_loss: bool, batch: Batch, evaluated: Batch
) -> Task:
  """Checks, by tracing, that a network and its task fit batches `[B, ...]`.

  Args:
    model: the searchable network.
    task: from `make_task`.
    default_loss: whether labels must be classes, as the default loss has it.
    batch: for training.
    evaluated: for the evaluation; of another size, maybe.

  Returns:
    The task, which checks the labels of any other batch by itself.

  Raises:
    ConfigError: where they return what a search cannot use.
  """

  def forward(batch, evaluated):
    *found, outputs = _forward(model, task, batch, evaluated)
    # Others may be of a class of the user's that JAX cannot return.
    return *found, outputs if default_loss else None

  found, before, after, logits = jax.eval_shape(forward, batch, evaluated)
  problems = []
  if default_loss:
    task = task._replace(check=_label_check(logits.shape))
    for given in (batch, evaluated):
      try:
        task.check(given)
      except ConfigError as error:
        problems += error.problems
  for values, given in zip(found, (batch, evaluated)):
    size = jax.tree.leaves(given)[0].shape[0]
    for name, value in values.items():
      problem = score_problem(name, _shapes(value), size)
      if not problem and jnp.issubdtype(value.dtype, jnp.complexfloating):
        problem = f'{name} is complex: expected real numbers'
      problems += [problem] if problem else []
  kinds = lambda tree: jax.tree.map(lambda a: (a.shape, a.dtype), tree)
  problems += [
    f'the network changes the shape or the dtype of its collection {name!r} as it is '
    'called: expected those that `init` makes; what is sown belongs in `intermediates`'
    for name in before
    if kinds(before[name]) != kinds(after.get(name))
  ]
  if problems:
    raise ConfigError(*dict.fromkeys(problems))
  return task


def initial_arguments(model: nn.Module, task: Task, batch: Batch) -> Arguments:
  """Returns what a network is called with for all of its parameters.

  That is a call as in evaluation, or as in training where that has more parameters, as
  those of a second head.

  Args:
    model: the searchable network.
    task: from `make_task`.
    batch: of any size.

  Raises:
    ConfigError: where both lack parameters of the other.
  """
  calls = [task.arguments(batch, train) for train in (False, True)]
  if not calls[0].kwargs:
    return calls[0]  # the same for both
  names = []
  for call in calls:
    init = functools.partial(model.init, jax.random.key(0), *call.args, **call.kwargs)
    leaves = jax.tree.leaves_with_path(plain(jax.eval_shape(init))['params'])
    names.append({jax.tree_util.keystr(path) for path, _ in leaves})
  if names[1] <= names[0]:
    return calls[0]
  if names[0] <= names[1]:
    return calls[1]
  raise ConfigError(
    f'parameter {min(names[0] - names[1])} is there in evaluation alone, and '
    f'{min(names[1] - names[0])} in training alone: expected a network that has all of '
    'its parameters in one of the two'
  )


def _forward(model, task, batch, evaluated):
  """Returns the scores of both batches, the collections before and after, outputs."""
  example = initial_arguments(model, task, batch)
  variables = plain(model.init(jax.random.key(0), *example.args, **example.kwargs))
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
  scores = {
    'loss': task.loss(outputs, batch),
    'quality': task.quality(outputs, batch),
    **task.metrics(outputs, batch),
  }
  call = task.arguments(evaluated, False)
  with call_named('evaluation'):
    outputs = model.apply(variables, *call.args, **call.kwargs)
  found = scores, task.evaluation(outputs, evaluated)
  before = {name: variables[name] for name in collections}
  return found, before, plain(updated), outputs


@contextlib.contextmanager
def misfits_named(model: Any, inputs: Any) -> Iterator[None]:
  """Names the module of a network that what it is called with does not fit.

  Args:
    model: the user's network.
    inputs: arrays that it is called with, or their shapes.
  """
  try:
    yield
  except (TypeError, ValueError, IndexError, KeyError, AttributeError) as error:
    # Mistakes in the user's own loss or code for tracing say more by themselves.
    path = _failed_module(error)
    if path is None or isinstance(error, ConfigError | jax.errors.JAXTypeError):
      raise
    remedy = 'expected a batch that fits, or inputs=..., a function to what does'
    if '`rngs`' in str(error):
      remedy = 'expected it to be made with rngs, as nnx.Dropout(0.5, rngs=rngs)'
    raise ConfigError(
      f'{type(model).__name__} called with {_shapes(inputs)}: {path or "."}: '
      f'{" ".join(str(error).split())}: {remedy}'
    ) from error


def _failed_module(error):
  """Returns the path of the innermost module that an error came from; None for none."""
  found, traceback = [], error.__traceback__
  while traceback:
    frame = traceback.tb_frame
    first = next(iter(frame.f_locals.values()), None)
    # Operators within a layer are ours.
    if not frame.f_globals.get('__name__', '').startswith('fliqs_jax.'):
      found += [first] if isinstance(first, nn.Module | nnx.Module) else []
    traceback = traceback.tb_next
  if not found:
    return None
  if isinstance(found[-1], nn.Module):
    return '/'.join(found[-1].path)
  paths = {id(module): path for path, module in nnx.iter_modules(found[0])}
  return '/'.join(map(str, paths.get(id(found[-1]), ())))


@contextlib.contextmanager
def call_named(what: str) -> Iterator[None]:
  """Says what a network needs that treats a call as one in training.

  Args:
    what: the call, in words.
  """
  try:
    yield
  except (flax_errors.InvalidRngError, flax_errors.ModifyScopeVariableError) as error:
    reason = str(error).splitlines()[0].partition(' (https')[0]
    raise ConfigError(
      f'the network cannot be called in {what}, without rngs and with all variables as '
      f'they are ({reason}): {_HOW_TO_CALL}'
    ) from None


def _label_check(shape):
  def check_labels(batch):
    if problem := label_problem(batch['label'], shape):
      raise ConfigError(problem)

  return check_labels
