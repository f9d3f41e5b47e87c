"""The Python interface: a search over a user's own network, data and loss.

    result = fliqs_jax.search(model, train_batches, eval_batches, num_steps=1000)

The loop is that of `python -m fliqs_jax.main`, and so are the files that it leaves.
"""

from collections.abc import Callable, Mapping
import dataclasses
import json
import os
import shutil
import sys
import tempfile
from typing import Any

from etils import epath
from flax import linen as nn
import jax
import ml_collections
import numpy as np

from fliqs_jax.data import batches
from fliqs_jax.layers import layer
from fliqs_jax.runs import assembly, evaluation
from fliqs_jax.search import assignments
from fliqs_jax.runs import networks
from fliqs_jax.runs import loop as train
from fliqs_jax.runs import result as results
from fliqs_jax.runs import setup as plans
from fliqs_jax.runs import workdir as workdirs
from fliqs_jax.layers.variants import architecture_decisions
from fliqs_jax.training import own_task as tasks
from fliqs_jax.errors import ConfigError
from fliqs_jax.runs.config import default_config, resolve
from fliqs_jax.linen.variables import FORMATS, nest
from fliqs_jax.errors import not_among
from fliqs_jax.training.task import Batch, Metrics
from fliqs_jax.linen.interception import Coverage, Searchable, make_searchable
from fliqs_jax.training.own_task import Score

# Where a field that is given by its last name alone is looked for, in this order.
_SECTIONS = ('search', '', 'optimizer', 'reward', 'quantizer', 'controller')
# Fields that the arguments say, or that only data from TFDS have.
_NOT_FIELDS = (
    'mode', 'batch_size', 'eval_batch_size', 'dataset', 'num_classes', 'dtype',
    'formats', 'checkpoint', 'model', 'input',
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class SearchResult:
  """What a search found.

  Attributes:
    model: the searched network; `model.apply(variables, ...)` computes with the found
      formats, and the user's own `apply` takes `variables['params']` without them.
    variables: parameters, statistics and other collections, and `formats`.
    content: what `search_result.json` holds.
    history: a dict of scalars and of the policy for each logging step.
    coverage: which layers were searched, and why others were not.
    workdir: the run's folder.
  """

  model: Searchable
  variables: Mapping[str, Any]
  content: Mapping[str, Any]
  history: list[dict[str, Any]]
  coverage: Coverage
  workdir: str
  _temporary: tempfile.TemporaryDirectory | None = dataclasses.field(repr=False)

  @property
  def formats(self) -> Mapping[str, Mapping[str, str]]:
    """The found formats, `{module path: {'weights': name, 'activations': name}}`."""
    return self.content['formats']

  @property
  def cost(self) -> float:
    """The cost under the found formats, in `content['cost_unit']`."""
    return self.content['cost']

  @property
  def target(self) -> float:
    """The target that was searched for, in the same unit."""
    return self.content['target']

  @property
  def policy(self) -> Mapping[str, Mapping[str, float]]:
    """The policy that was searched, `{decision: {format: probability}}`."""
    return self.content['policy']

  @property
  def eval(self) -> Mapping[str, float]:
    """Means over the evaluation's examples, and their number `num_examples`."""
    return self.content['eval']

  def save(self, folder: os.PathLike | str) -> None:
    """Copies the run's files into a new folder, a workdir like any other.

    Raises:
      ConfigError: where the folder exists and is not empty, or cannot be written.
    """
    folder = os.fspath(folder)
    if os.path.isfile(folder) or (os.path.isdir(folder) and os.listdir(folder)):
      raise ConfigError(f'{folder!r} exists: expected a new or empty folder')
    try:
      ignored = shutil.ignore_patterns(workdirs.LOCK_FILE)
      shutil.copytree(self.workdir, folder, ignore=ignored, dirs_exist_ok=True)
    except OSError as error:
      raise ConfigError(f'cannot write to {folder!r}: {error}') from None


def search(
  model: nn.Module,
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
) -> SearchResult:
  """Searches the formats of a network's layers while it trains.

  Args:
    model: any linen module; see `searchable.make_searchable` for what is searched.
    train_batches: dicts of numpy arrays `[B, ...]`, all of one size: an iterator, or
      a function that returns one, or a list, which start over when they end. B is a
      multiple of the samples and of the devices.
    eval_batches: the same, each example once; the last batch may be smaller.
    loss: see `tasks.make_objective`, as for `quality`, `metrics` and `inputs`.
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
  if jax.process_count() > 1:
    raise ConfigError('fliqs_jax.search runs in one process: use python -m '
                      'fliqs_jax.main for several')  # fmt: skip
  config = _with_fields(config, fields)
  first, train_batches = batches.first_batch(train_batches, 'train_batches')
  evaluated, eval_batches = batches.first_batch(eval_batches, 'eval_batches')
  config.batch_size = batches.batch_size(first, 'train_batches')
  config.dataset = 'own batches'
  objective = tasks.make_objective(model, loss, quality, metrics, inputs)
  network, coverage = _network(config, model, objective, first, evaluated)
  print(coverage, file=sys.stderr)
  config.model = {
    'name': type(model).__name__,
    'width': 1.0,
    'layers': json.dumps(layer.to_json(network.layers)),
  }
  config = resolve(config)
  temporary = None if workdir else tempfile.TemporaryDirectory(prefix='fliqs_jax_')
  folder = epath.Path(workdir or temporary.name)
  attempt = plans.Attempts()
  setup = attempt(assembly.build, config, jax.device_count(), None, network)
  start = plans.check_start(attempt, config, setup, variables)
  attempt(workdirs.check, config, folder, False)
  attempt.raise_problems()
  num_samples, size = config.search.num_samples, config.batch_size
  data = plans.Data(
    lambda seed, sharding: batches.TrainBatches(train_batches, num_samples, size),
    lambda sharding: batches.eval_batches(eval_batches),
  )
  content = train.run_plan(config, folder, plans.Plan(setup, data, start))
  return SearchResult(
    model=network.model,
    variables=_final_variables(setup, folder, content['formats']),
    content=content,
    history=[
      json.loads(line)
      for line in (folder / workdirs.HISTORY_FILE).read_text().splitlines()
    ],
    coverage=coverage,
    workdir=str(folder),
    _temporary=temporary,
  )


def evaluate(
  model: nn.Module,
  eval_batches: batches.Source,
  workdir: os.PathLike | str,
  *,
  formats: str | assignments.Assignment | None = None,
  loss: Score | None = None,
  quality: Score | None = None,
  metrics: Callable[[Any, Batch], Metrics] | None = None,
  inputs: str | Callable[[Batch], Any] = 'image',
) -> dict[str, float]:
  """Evaluates the weights of a finished search under its formats, or others.

  Args:
    model: as in `search`, as `eval_batches`, `loss`, `quality`, `metrics`, `inputs`.
    eval_batches: each example once.
    workdir: of the search, or where its result was saved.
    formats: a format for all layers, or an assignment such as `SearchResult.formats`;
      None takes what was found.
    loss: as in `search`.
    quality: as in `search`.
    metrics: as in `search`.
    inputs: as in `search`.

  Raises:
    ConfigError: where the folder holds no such run.
  """
  folder, attempt = epath.Path(workdir), plans.Attempts()
  config = attempt(workdirs.read_config, folder)
  if formats is None:
    result = attempt(results.read_result, folder / results.RESULT_FILE)
    formats = result and result['formats']
  attempt.raise_problems()
  first, eval_batches = batches.first_batch(eval_batches, 'eval_batches')
  objective = tasks.make_objective(model, loss, quality, metrics, inputs)
  network, _ = _network(config, model, objective, first, first)
  setup = attempt(assembly.build, config, jax.device_count(), formats, network)
  attempt.raise_problems()
  state, mesh = evaluation.restored_state(setup, folder)
  data = plans.Data(None, lambda sharding: batches.eval_batches(eval_batches))
  return evaluation.evaluate(setup, mesh, data, state, np.zeros(0, np.int32))


def _network(config, model, objective, first, evaluated):
  """Returns the user's network as the loop takes it, and what of it is searched."""
  attempt = plans.Attempts()
  searchable = attempt(make_searchable, model, **config.quantizer.to_dict())
  attempt.raise_problems()
  tasks.check(searchable, objective, first, evaluated)
  one = jax.tree.map(lambda a: a[:1], first)
  example = objective.arguments(one, False)
  example = example._replace(
    args=jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), example.args)
  )
  coverage = attempt(searchable.coverage, *example.args, **example.kwargs)
  attempt.raise_problems()
  if not coverage.layers:
    raise ConfigError(f'no layer of {type(model).__name__} can be searched', *(
        f'{path or "the network"}: {why}' for path, why in coverage.skipped.items()
    ))  # fmt: skip
  if architecture_decisions(coverage.layers):
    raise ConfigError(
      f'the architecture of {type(model).__name__} is left open: fliqs_jax.search '
      'decides formats alone, python -m fliqs_jax.main the architecture too'
    )
  return networks.Network(searchable, example, coverage.layers, objective), coverage


def _final_variables(setup, folder, formats):
  """Returns what the found network computes with, in numpy."""
  state, _ = evaluation.restored_state(setup, folder)
  choices = setup.space.choices_of(formats)
  formats = nest(setup.space.layers, setup.space.bind(choices))
  return jax.device_get(
    {'params': state.params, **state.model_stats, FORMATS: formats}
  )


def _with_fields(config, fields):
  """Returns a copy of a config with fields that are given by their last names."""
  config = (config or default_config()).copy_and_resolve_references()
  names, problems = _field_names(config), []
  for name, value in fields.items():
    if name not in names:
      given = f'unknown argument {name!r}'
      problems.append(not_among(given, name, names, 'a field of the config'))
      continue
    if name == 'formats' and isinstance(value, list | tuple):
      value = ','.join(value)
    try:
      config.update_from_flattened_dict({names[name]: value})
    except TypeError as error:
      problems.append(f'{name}={value!r}: {str(error).splitlines()[0]}')
  if config.reward.split != 'train':
    problems.append(
      f'reward.split={config.reward.split!r}: expected train, since a search in Python '
      'measures the quality on the training batches'
    )
  if problems:
    raise ConfigError(*problems)
  return config


def _field_names(config):
  """Returns `{name of an argument: field}`; an optimizer's own name is `optimizer`."""
  names = {}
  for section in reversed(_SECTIONS):
    for name in config[section] if section else config:
      if name == 'name':
        names[section] = f'{section}.name'
      elif section or name not in (*_NOT_FIELDS, *_SECTIONS):
        names[name] = f'{section}.{name}'.lstrip('.')
  return names
