"""Searches, and trainings in fixed formats, over a user's own network and data."""

from collections.abc import Callable, Iterator, Mapping, Sequence
import os
from typing import Any

import ml_collections

from fliqs_jax.api.arguments import (
  field_names,
  formats_field,
  search_config,
  with_fields,
)
from fliqs_jax.api.own_network import Model, Scores
from fliqs_jax.api.own_run import own_run, prepare, to_result
from fliqs_jax.api.results import Front, Result
from fliqs_jax.data import batches
from fliqs_jax.errors import ConfigError
from fliqs_jax.runs import front, loop
from fliqs_jax.runs import targets as targets_lib
from fliqs_jax.runs.config import resolve
from fliqs_jax.runs.jax_settings import usual_settings
from fliqs_jax.training.task import Batch, Metrics, Score


def search(
  model: Model,
  train_batches: batches.Source,
  eval_batches: batches.Source,
  *,
  loss: Score | None = None,
  quality: Score | None = None,
  metrics: Callable[[Any, Batch], Metrics] | None = None,
  inputs: str | Callable[[Batch], Any] = 'image',
  variables: Mapping[str, Any] | None = None,
  workdir: os.PathLike | str | None = None,
  config: ml_collections.ConfigDict | None = None,
  **fields: Any,
) -> Result:
  """Searches the formats of a network's layers while it trains.

  With `strategy='sensitivity', num_steps=0` nothing is trained: formats are found for
  the weights in `variables`, or an NNX module's own, by forward passes on the first
  `statistics_batches` of `train_batches`.

  Args:
    model: an instance of a linen or an NNX module, which is not changed; see
      `make_searchable` for what is searched. One of NNX trains from its own weights.
    train_batches: dicts of numpy arrays `[B, ...]`, all of one size: an iterator, or
      a function that returns one, or a list, which start over when they end. B is a
      multiple of the samples and of the devices.
    eval_batches: the same, each example once; the last batch may be smaller.
    loss: see `user_task.make_task`, as for `quality`, `metrics` and `inputs`.
    quality: what the search rewards.
    metrics: what else is logged and evaluated.
    inputs: what of a batch the network is called with.
    variables: `params`, and `batch_stats` if there are some, to start from.
    workdir: folder for the run's files; the same call resumes what is unfinished in
      it. Batches must come in the same order again: those of an iterator without
      `set_state` are taken anew up to where the run was. None for a temporary folder.
    config: from `config.default_config`; None for the defaults.
    **fields: of the config, by their last name (`num_steps`, `formats`,
      `target_format`, `target_scale`, `num_samples`, `learning_rate`, ...), and
      `optimizer` and `reward` by the name of one.

  Raises:
    ConfigError: where something is wrong, with a line for each problem.
    FloatingPointError: where a loss is not finite.
  """
  config = search_config(config, fields)
  if config.search.targets:
    raise ConfigError(
      f'targets={config.search.targets!r}: expected fliqs_jax.search_front, which '
      'returns a result for each'
    )
  scores = Scores(loss, quality, metrics, inputs)
  return _run(config, model, train_batches, eval_batches, scores, variables, workdir)


@usual_settings()
def search_front(
  model: Model,
  train_batches: batches.Source,
  eval_batches: batches.Source,
  *,
  targets: Sequence[str | float],
  loss: Score | None = None,
  quality: Score | None = None,
  metrics: Callable[[Any, Batch], Metrics] | None = None,
  inputs: str | Callable[[Batch], Any] = 'image',
  variables: Mapping[str, Any] | None = None,
  workdir: os.PathLike | str | None = None,
  config: ml_collections.ConfigDict | None = None,
  **fields: Any,
) -> Front:
  """Searches the formats for several targets, with one supernet for all.

  The steps before the commitment are shared, a third of all by default; from there on
  the weights finish under the formats of each target.

  Args:
    model: as in `search`, as all that is not named here.
    train_batches: as in `search`, but no iterator, since each target starts over.
    eval_batches: the same.
    targets: each a format, for the cost of the uniform model in it, `SCALE*FORMAT`, or
      a number in the cost model's unit.
    loss: as in `search`.
    quality: as in `search`.
    metrics: as in `search`.
    inputs: as in `search`.
    variables: as in `search`.
    workdir: folder in which each target has one of its own.
    config: as in `search`.
    **fields: as in `search`.

  Returns:
    A result for each target, by the target's text, in a dict that prints as a table.

  Raises:
    ConfigError: where something is wrong, with a line for each problem.
    FloatingPointError: where a loss is not finite.
  """
  config = search_config(config, {**fields, 'targets': _as_tuple(targets)})
  if not config.search.targets:
    raise ConfigError(f'targets={targets!r}: expected one or more')
  _check_repeatable(train_batches=train_batches, eval_batches=eval_batches)
  scores = Scores(loss, quality, metrics, inputs)
  own = own_run(config, model, train_batches, eval_batches, scores, variables, workdir)
  setups = {
    name: prepare(run, own, own.folder / name, variables)
    for name, run in front.plan(config).items()
  }
  contents = front.train(setups, own.folder)
  texts = targets_lib.split(config.search.targets)
  return Front(
    (text, to_result(own, setups[name], own.folder / name, contents[name]))
    for text, name in zip(texts, setups, strict=True)
  )


def _check_repeatable(**sources):
  for name, source in sources.items():
    if isinstance(source, Iterator):
      raise ConfigError(
        f'{name} is an iterator, which ends: expected a list, or a function that '
        'returns an iterator, since each target starts over'
      )


def _as_tuple(targets):
  if isinstance(targets, str | float | int):
    return (targets,)
  if not isinstance(targets, Sequence):
    raise ConfigError(
      f"targets={targets!r}: expected a list, as ['int4', '1.5*int4', 0.25]"
    )
  return tuple(targets)


def train(
  model: Model,
  train_batches: batches.Source,
  eval_batches: batches.Source,
  *,
  formats: 'Result | os.PathLike | str | Mapping[str, Any]',
  loss: Score | None = None,
  quality: Score | None = None,
  metrics: Callable[[Any, Batch], Metrics] | None = None,
  inputs: str | Callable[[Batch], Any] = 'image',
  variables: Mapping[str, Any] | None = None,
  workdir: os.PathLike | str | None = None,
  config: ml_collections.ConfigDict | None = None,
  **fields: Any,
) -> Result:
  """Trains a network whose layers have fixed formats.

  Args:
    model: as in `search`, as all that is not named here.
    train_batches: as in `search`; B is a multiple of the devices.
    eval_batches: as in `search`.
    formats: a format for all layers, `float32` for none; an assignment such as
      `{'head': 'int8', '.*': 'int4'}`; a `Result`, whose formats are taken without its
      weights; or the path of a file of formats or of a result.
    loss: as in `search`.
    quality: what is evaluated besides the loss.
    metrics: as in `search`.
    inputs: as in `search`.
    variables: as in `search`, those of a result for instance.
    workdir: as in `search`.
    config: as in `search`.
    **fields: as in `search`, without those that only a search has.

  Raises:
    ConfigError: where something is wrong, with a line for each problem.
    FloatingPointError: where a loss is not finite.
  """
  config = with_fields(config, fields, field_names('train'))
  config.mode, config.formats = 'train', formats_field(formats)
  scores = Scores(loss, quality, metrics, inputs)
  return _run(config, model, train_batches, eval_batches, scores, variables, workdir)


@usual_settings()
def _run(config, model, train_batches, eval_batches, scores, variables, workdir):
  """Searches or trains as the config says, and returns the result."""
  own = own_run(config, model, train_batches, eval_batches, scores, variables, workdir)
  setup = prepare(resolve(config), own, own.folder, variables)
  return to_result(own, setup, own.folder, loop.train(setup, own.folder))
