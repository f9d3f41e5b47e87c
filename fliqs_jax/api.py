"""The Python interface: runs over a user's own network, data and loss.

    result = fliqs_jax.search(model, train_batches, eval_batches, num_steps=1000)
    fixed = fliqs_jax.train(model, train_batches, eval_batches, formats='int8')

The loop is that of `python -m fliqs_jax.main`, and so are the files that it leaves.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import json
import os
import shutil
import sys
import tempfile
from typing import Any, NamedTuple

from etils import epath
from flax import linen as nn
from flax import nnx
import jax
import ml_collections
import numpy as np

from fliqs_jax.data import batches
from fliqs_jax.errors import ConfigError, Problems, not_among
from fliqs_jax.exporting import deployment, exporter
from fliqs_jax.layers.coverage import Coverage
from fliqs_jax.layers.variables import FORMATS, nest
from fliqs_jax.layers.variants import architecture_decisions
from fliqs_jax.linen import interception
from fliqs_jax.nnx.searchable import Searchable as NnxSearchable
from fliqs_jax.reporting import notebook, terminal
from fliqs_jax.reporting import overview as overview_lib
from fliqs_jax.runs import evaluation, files, front, loop, preparation
from fliqs_jax.runs import result as result_lib
from fliqs_jax.runs import setup as setup_lib
from fliqs_jax.runs import targets as targets_lib
from fliqs_jax.runs import workdir as workdir_lib
from fliqs_jax.runs.config import OWN_BATCHES, complete, default_config, resolve
from fliqs_jax.runs.network import Network
from fliqs_jax.runs.promotion import usual_promotion
from fliqs_jax.runs.setup import Data, Setup
from fliqs_jax.search import assignments
from fliqs_jax.training import user_task
from fliqs_jax.training.task import Batch, Metrics, Score

# A user's own network: a module of either interface of Flax.
Model = nn.Module | nnx.Module

# Where a field that is given by its last name alone is looked for, in this order.
_SECTIONS = ('search', '', 'optimizer', 'reward', 'quantizer', 'controller')
# Those of `search` that a training with fixed formats has too.
_OF_TRAINING = (
  'cost_model', 'device', 'latency_table', 'weight_delay', 'activation_delay',
  'statistics_batches', 'attention_products',
)  # fmt: skip
# Fields that the arguments say, or that only data from TFDS have.
_NOT_FIELDS = (
    'mode', 'batch_size', 'eval_batch_size', 'dataset', 'num_classes', 'dtype',
    'formats', 'checkpoint', 'model', 'input',
)  # fmt: skip


@dataclasses.dataclass(frozen=True, repr=False)
class Result:
  """Result of a run: the network, its weights, its formats, and the record.

  The formats are those that a search has found, or those that a training was given.

  Attributes:
    model: the network with these formats. Of an NNX module, an NNX module with the
      trained weights, as for evaluation. Of a linen module, what computes with
      them in `model.apply(variables, ...)`; the user's own `apply` takes
      `variables['params']` without formats.
    variables: parameters, statistics and other collections, and `formats`.
    content: what `search_result.json` holds.
    history: a dict of scalars and of the policy for each logging step.
    coverage: which layers have formats, and why others have none.
    workdir: the run's folder.
  """

  model: interception.Searchable | nnx.Module
  variables: Mapping[str, Any]
  content: Mapping[str, Any]
  history: list[dict[str, Any]]
  coverage: Coverage
  workdir: str
  _setup: Setup
  _temporary: tempfile.TemporaryDirectory | None

  def __repr__(self) -> str:
    return terminal.to_text(*terminal.result_parts(self.content, self.workdir))

  def _repr_html_(self) -> str:
    return notebook.to_html(*terminal.result_parts(self.content, self.workdir))

  @property
  def formats(self) -> Mapping[str, Mapping[str, str]]:
    """The formats, `{module path: {'weights': name, 'activations': name}}`."""
    return self.content['formats']

  @property
  def cost(self) -> float:
    """The cost under these formats, in `content['cost_unit']`."""
    return self.content['cost']

  @property
  def target(self) -> float | None:
    """The target that was searched for, in the same unit.

    None of a training, and of a search with `max_quality_drop`.
    """
    return self.content['target']

  @property
  def policy(self) -> Mapping[str, Mapping[str, float]]:
    """The policy, `{decision: {format: probability}}`; empty of a training."""
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
    folder = str(files.to_path(folder))
    if os.path.isfile(folder) or (os.path.isdir(folder) and os.listdir(folder)):
      raise ConfigError(f'{folder!r} exists: expected a new or empty folder')
    try:
      ignored = shutil.ignore_patterns(workdir_lib.LOCK_FILE)
      # A temporary folder is its owner's alone, and copytree copies the mode.
      os.makedirs(folder, exist_ok=True)
      mode = os.stat(folder).st_mode
      shutil.copytree(self.workdir, folder, ignore=ignored, dirs_exist_ok=True)
      os.chmod(folder, mode)
    except OSError as error:
      raise ConfigError(f'cannot write to {folder!r}: {error}') from None

  @usual_promotion()
  def export(self, to: str, folder: os.PathLike | str) -> dict[str, Any]:
    """Exports the network, loads it again, and compares the outputs.

    Args:
      to: one of `exporting.exporter.TARGETS`.
      folder: to be made; an earlier export in it is replaced.

    Returns:
      What `report.json` in the folder holds: examples of the evaluation batches,
      differences, means of the evaluation, bytes.

    Raises:
      ConfigError: where the target cannot express the network, or the folder cannot be
        written.
      Mismatch: where what was exported computes something else; no folder is left.
    """
    exporter.check(to, folder)
    state, _ = evaluation.restored_state(self._setup, files.to_path(self.workdir))
    deployed = deployment.make_deployment(self._setup, state, self.content)
    return exporter.export(deployed, to, folder)


def make_searchable(
  model: Model, attention_products: bool = False, **attributes: Any
) -> interception.Searchable | NnxSearchable:
  """Returns the `init` and `apply` of a network whose layers are searched.

  Args:
    model: an instance of a linen or an NNX module, which is not changed. Searched are
      the convolutions, the dense layers (so the projections of attention and of LoRA),
      the einsums and, of NNX, `nnx.Embed.attend`; layers with a hook of their own stay
      as they are.
    attention_products: whether the products inside attention, QKᵀ and AV, are searched
      too, as `search.attention_products` of a config.
    **attributes: of the quantized operators: calibration, momentum.

  Raises:
    ConfigError: where the model is anything else, or quantized already.

  Examples:
    >>> from flax import nnx
    >>> import jax.numpy as jnp
    >>> import fliqs_jax
    >>> model = fliqs_jax.make_searchable(nnx.Linear(8, 4, rngs=nnx.Rngs(0)))
    >>> print(model.coverage(jnp.ones((1, 8))))
    1 layers are searched:
    .: dense (8, 4), 32 MACs
    100.0% of the multiply-accumulates by parameters are searched
  """
  if isinstance(model, nnx.Module):
    return NnxSearchable(model, attributes, attention_products)
  if isinstance(model, NnxSearchable):
    return model
  return interception.make_searchable(model, attention_products, **attributes)


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
  config = _search_config(config, fields)
  if config.search.targets:
    raise ConfigError(
      f'targets={config.search.targets!r}: expected fliqs_jax.search_front, which '
      'returns a result for each'
    )
  scores = _Scores(loss, quality, metrics, inputs)
  return _run(config, model, train_batches, eval_batches, scores, variables, workdir)


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
) -> dict[str, Result]:
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
    A result for each target, by the target's text.

  Raises:
    ConfigError: where something is wrong, with a line for each problem.
    FloatingPointError: where a loss is not finite.
  """
  config = _search_config(config, {**fields, 'targets': _as_tuple(targets)})
  if not config.search.targets:
    raise ConfigError(f'targets={targets!r}: expected one or more')
  sources = {'train_batches': train_batches, 'eval_batches': eval_batches}
  for name, source in sources.items():
    if isinstance(source, Iterator):
      raise ConfigError(
        f'{name} is an iterator, which ends: expected a list, or a function that '
        'returns an iterator, since each target starts over'
      )
  scores = _Scores(loss, quality, metrics, inputs)
  own = _own_run(config, model, train_batches, eval_batches, scores, workdir)
  setups = {
    name: _prepare(run, own, own.folder / name, variables)
    for name, run in front.plan(config).items()
  }
  contents = front.train(setups, own.folder)
  texts = targets_lib.split(config.search.targets)
  return {
    text: _to_result(own, setups[name], own.folder / name, contents[name])
    for text, name in zip(texts, setups, strict=True)
  }


def _as_tuple(targets):
  return (targets,) if isinstance(targets, str | float | int) else tuple(targets)


def _search_config(config, fields):
  """Returns the config of a search with fields by their last names."""
  config = _with_fields(config, fields, _field_names('search'))
  if config.reward.split != 'train':
    raise ConfigError(
      f'reward.split={config.reward.split!r}: expected train, since a search in Python '
      'measures the quality on the training batches'
    )
  return config


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
  config = _with_fields(config, fields, _field_names('train'))
  config.mode, config.formats = 'train', _formats_field(formats)
  scores = _Scores(loss, quality, metrics, inputs)
  return _run(config, model, train_batches, eval_batches, scores, variables, workdir)


class _Scores(NamedTuple):
  """Functions of a user's task, as `user_task.make_task` takes them."""

  loss: Score | None
  quality: Score | None
  metrics: Callable[[Any, Batch], Metrics] | None
  inputs: str | Callable[[Batch], Any]


@usual_promotion()
def _run(config, model, train_batches, eval_batches, scores, variables, workdir):
  """Searches or trains as the config says, and returns the result."""
  own = _own_run(config, model, train_batches, eval_batches, scores, workdir)
  setup = _prepare(resolve(config), own, own.folder, variables)
  return _to_result(own, setup, own.folder, loop.train(setup, own.folder))


class _OwnRun(NamedTuple):
  """Network, batches and folder of a run from Python: all but its config."""

  network: Network
  coverage: Coverage
  data: Callable[[Setup], Data]
  folder: epath.Path
  temporary: tempfile.TemporaryDirectory | None


def _own_run(config, model, train_batches, eval_batches, scores, workdir):
  """Looks at the network and the batches, and writes into the config what they say."""
  if jax.process_count() > 1:
    raise ConfigError(
      f'fliqs_jax.{config.mode} runs in one process: use python -m fliqs_jax.main for '
      'several'
    )
  first, train_batches = batches.first_batch(train_batches, 'train_batches')
  evaluated, eval_batches = batches.first_batch(eval_batches, 'eval_batches')
  _describe(config, model, first)
  network, coverage = _network(config, model, scores, first, evaluated)
  print(coverage, file=sys.stderr)
  temporary = None if workdir else tempfile.TemporaryDirectory(prefix='fliqs_jax_')
  return _OwnRun(
    network=network,
    coverage=coverage,
    data=lambda setup: _data(setup, train_batches, eval_batches, first, evaluated),
    folder=files.to_path(workdir or temporary.name),
    temporary=temporary,
  )


def _to_result(own, setup, folder, content):
  model, final = own.network.model, _final_variables(setup, folder, content['formats'])
  return Result(
    model=model.merge(final),
    variables=final,
    content=content,
    history=workdir_lib.read_history(folder),
    coverage=own.coverage,
    workdir=str(folder),
    _setup=setup,
    _temporary=own.temporary,
  )


def _describe(config, model, batch):
  """Writes into a config what it says of a user's network and batches."""
  config.batch_size = batches.batch_size(batch, 'train_batches')
  config.dataset = OWN_BATCHES
  config.model = _describe_model(model)


def _describe_model(model):
  return {'name': type(model).__name__, 'width': 1.0}


def _prepare(config, own, folder, variables):
  """Returns what a run needs, after all checks."""
  problems, network = Problems(), own.network
  formats = problems.attempt(preparation.fixed_formats, config)
  problems.raise_any()
  devices = jax.device_count()
  setup = problems.attempt(setup_lib.build, config, devices, formats, network)
  start = preparation.attempt_start(problems, config, setup, variables)
  problems.attempt(workdir_lib.check, config, folder, False)
  problems.attempt(workdir_lib.check_layers, network.layers, folder)
  problems.raise_any()
  return setup._replace(start=start, data=own.data(setup))


def _data(setup, train_batches, eval_batches, first, evaluated):
  num_samples, size = setup.num_samples, setup.config.batch_size
  check = batches.alike('train_batches', first, setup.task.check)
  return Data(
    lambda seed, sharding: batches.TrainBatches(
      train_batches, num_samples, size, check
    ),
    _evaluation_data(setup, eval_batches, evaluated),
  )


def _evaluation_data(setup, eval_batches, evaluated):
  check = batches.alike('eval_batches', evaluated, setup.task.check)
  return lambda sharding: batches.eval_batches(eval_batches, check)


@usual_promotion()
def overview(
  model: Model,
  *inputs: Any,
  formats: Result | os.PathLike | str | Mapping[str, Any] = 'bf16',
  config: ml_collections.ConfigDict | None = None,
  **kwargs: Any,
) -> overview_lib.Overview:
  """Returns the layers of a network and its costs, without training it.

  Args:
    model: as in `search`.
    *inputs: what the network is called with, arrays `[B, ...]` or their shapes as
      `jax.ShapeDtypeStruct`; costs are those of one example.
    formats: as in `train`.
    config: whose cost model, formats and target are shown; None for the defaults.
    **kwargs: of the network's call; flags of training are off by themselves.

  Raises:
    ConfigError: where something is wrong, with a line for each problem.

  Examples:
    >>> from flax import nnx
    >>> import jax.numpy as jnp
    >>> import fliqs_jax
    >>> model = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
    >>> found = fliqs_jax.overview(model, jnp.ones((1, 8)), formats='int4')
    >>> found.macs, found.layers[0]['weights'], f'{found.total:.3g} {found.cost_unit}'
    (32, 'int4', '5.12e-07 GBOPs')
  """
  config = (config or default_config()).copy_and_resolve_references()
  config.dataset, config.model = OWN_BATCHES, _describe_model(model)
  assignment = files.read_formats(_formats_field(formats))
  task = user_task.make_task(model, inputs=lambda batch: (batch, kwargs))
  searchable = _searchable(config, model)
  one = jax.tree.map(_first_example, inputs)
  coverage, example = _coverage(searchable, model, task, one)
  found = overview_lib.describe(
    resolve(config),
    assignment,
    label=formats if isinstance(assignment, str) else 'the formats given',
    own=Network(searchable, example, coverage.layers, task),
  )
  return dataclasses.replace(found, coverage=coverage)


def _first_example(a):
  if not hasattr(a, 'shape'):
    return a  # which is reported as an argument of the network
  dtype = jax.dtypes.canonicalize_dtype(a.dtype)
  return jax.ShapeDtypeStruct((1, *a.shape[1:])[: len(a.shape)], dtype)


@usual_promotion()
def evaluate(
  model: Model,
  eval_batches: batches.Source,
  workdir: os.PathLike | str,
  *,
  formats: Result | os.PathLike | str | Mapping[str, Any] | None = None,
  loss: Score | None = None,
  quality: Score | None = None,
  metrics: Callable[[Any, Batch], Metrics] | None = None,
  inputs: str | Callable[[Batch], Any] = 'image',
) -> dict[str, float]:
  """Evaluates the weights of a finished run under its formats, or others.

  Args:
    model: as in `search`, as `eval_batches`, `loss`, `quality`, `metrics`, `inputs`.
    eval_batches: each example once.
    workdir: of the run, or where its result was saved.
    formats: as in `train`; None takes those of the run.
    loss: as in `search`.
    quality: as in `search`.
    metrics: as in `search`.
    inputs: as in `search`.

  Raises:
    ConfigError: where the folder holds no such run.
  """
  folder = files.to_path(workdir)
  problems = Problems()
  config = problems.attempt(workdir_lib.read_config, folder)
  formats = problems.attempt(_evaluated_formats, formats, folder)
  problems.raise_any()
  config = complete(config)
  first, eval_batches = batches.first_batch(eval_batches, 'eval_batches')
  scores = _Scores(loss, quality, metrics, inputs)
  network, _ = _network(config, model, scores, first, first)
  setup = setup_lib.build(config, jax.device_count(), formats, network)
  setup = setup._replace(data=Data(None, _evaluation_data(setup, eval_batches, first)))
  state, mesh = evaluation.restored_state(setup, folder)
  return evaluation.make_evaluate(setup, mesh)(state, np.zeros(0, np.int32))


def _evaluated_formats(formats, folder):
  """Returns the given formats, one name or by layer, or those of the run."""
  if formats is None:
    return result_lib.read_result(folder / result_lib.RESULT_FILE)['formats']
  return files.read_formats(_formats_field(formats))


def _formats_field(formats):
  """Returns given formats as the field `formats` of a config has them."""
  if isinstance(formats, str | os.PathLike):
    return os.fspath(formats)
  given = formats.formats if isinstance(formats, Result) else formats
  given = dict(given) if isinstance(given, Mapping) else given
  return json.dumps(assignments.parse(given, 'formats'))


def _network(
  config: ml_collections.ConfigDict,
  model: Model,
  scores: _Scores,
  first: Batch,
  evaluated: Batch,
) -> tuple[Network, Coverage]:
  """Returns the user's network as the loop takes it, and what of it is searched."""
  task = user_task.make_task(model, *scores)
  searchable = _searchable(config, model)
  with user_task.misfits_named(model, task.arguments(first, True).args):
    task = user_task.check(searchable, task, scores.loss is None, first, evaluated)
  one = jax.tree.map(lambda a: a[:1], first)
  coverage, _ = _coverage(searchable, model, task, one)
  example = _with_shapes(user_task.initial_arguments(searchable, task, one))
  return Network(searchable, example, coverage.layers, task), coverage


def _searchable(config, model):
  products = config.search.attention_products
  return make_searchable(model, products, **config.quantizer.to_dict())


def _coverage(searchable, model, task, batch):
  """Returns what of a network is searched, and how it is called in evaluation."""
  called = _with_shapes(task.arguments(batch, False))
  with user_task.misfits_named(model, called.args):
    coverage = searchable.coverage(*called.args, **called.kwargs)
  name = type(model).__name__
  if not coverage.layers:
    reasons = (
      f'{path or "the network"}: {why}' for path, why in coverage.skipped.items()
    )
    raise ConfigError(f'no layer of {name} can be searched', *reasons)
  if architecture_decisions(coverage.layers):
    raise ConfigError(
      f'the architecture of {name} is left open: fliqs_jax.search decides formats '
      'alone, python -m fliqs_jax.main the architecture too'
    )
  return coverage, called


def _with_shapes(arguments):
  shape = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype)
  return arguments._replace(args=jax.tree.map(shape, arguments.args))


def _final_variables(setup, folder, formats):
  """Returns what the found network computes with, in numpy."""
  state, _ = evaluation.restored_state(setup, folder)
  choices = setup.space.choices_of(formats)
  formats = nest(setup.space.layers, setup.space.bind(choices))
  return jax.device_get({'params': state.params, **state.model_stats, FORMATS: formats})


def _with_fields(config, fields, names):
  """Returns a copy of a config with fields that are given by their last names."""
  config = (config or default_config()).copy_and_resolve_references()
  problems = []
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
  if problems:
    raise ConfigError(*problems)
  return config


def _field_names(mode):
  """Returns `{name of an argument: field}`; an optimizer's own name is `optimizer`."""
  names, config = {}, default_config()
  for section in reversed(_SECTIONS):
    for name in config[section] if section else config:
      if mode == 'train' and not _trains(section, name):
        continue
      if name == 'name':
        names[section] = f'{section}.name'
      elif section or name not in (*_NOT_FIELDS, *_SECTIONS):
        names[name] = f'{section}.{name}'.lstrip('.')
  return names


def _trains(section, name):
  """Returns whether a field has an effect on a training with fixed formats."""
  if section == 'search':
    return name in _OF_TRAINING
  return section not in ('reward', 'controller')
