"""Costs of a network before it is trained, and the quality of a finished run."""

from collections.abc import Callable, Mapping
import dataclasses
import os
from typing import Any

import jax
import ml_collections
import numpy as np

from fliqs_jax.api.arguments import copy_of, formats_field
from fliqs_jax.api.own_network import (
  Model,
  Scores,
  check_network,
  coverage_of,
  describe_model,
  searchable_of,
)
from fliqs_jax.api.own_run import evaluation_data
from fliqs_jax.api.results import Result
from fliqs_jax.data import batches
from fliqs_jax.errors import Problems
from fliqs_jax.reporting import overview as overview_lib
from fliqs_jax.runs import distributed, evaluation, files
from fliqs_jax.runs import result as result_lib
from fliqs_jax.runs import setup as setup_lib
from fliqs_jax.runs import workdir as workdir_lib
from fliqs_jax.runs.config import complete, resolve
from fliqs_jax.runs.jax_settings import usual_settings
from fliqs_jax.runs.network import Network
from fliqs_jax.runs.setup import Data
from fliqs_jax.runs.validation import OWN_BATCHES
from fliqs_jax.training import user_task
from fliqs_jax.training.task import Batch, Metrics, Score


@usual_settings()
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
  config = copy_of(config)
  config.dataset, config.model = OWN_BATCHES, describe_model(model)
  assignment = files.read_formats(formats_field(formats))
  searchable = searchable_of(config, model)
  task = user_task.make_task(model, inputs=lambda batch: (batch, kwargs))
  one = jax.tree.map(_first_example, inputs)
  coverage, example = coverage_of(searchable, model, task, one)
  with user_task.call_named('evaluation'):
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


@usual_settings()
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
  folder = files.to_path(workdir, 'workdir')
  problems = Problems()
  config = problems.attempt(workdir_lib.read_config, folder)
  formats = problems.attempt(_evaluated_formats, formats, folder)
  problems.raise_any()
  config = complete(config)
  config.mode, config.fsdp = 'eval', 1  # wherever it was trained
  first, eval_batches = batches.first_batch(eval_batches, 'eval_batches')
  scores = Scores(loss, quality, metrics, inputs)
  network, _ = check_network(config, model, scores, first, first)
  distributed.check_alike({'eval_batches': first, 'formats': formats})
  setup = setup_lib.build(config, jax.device_count(), formats, network)
  data = Data(None, evaluation_data(setup, eval_batches, first), whole=True)
  setup = setup._replace(data=data)
  state, mesh = evaluation.restored_state(setup, folder)
  return evaluation.make_evaluate(setup, mesh)(state, np.zeros(0, np.int32))


def _evaluated_formats(formats, folder):
  """Returns the given formats, one name or by layer, or those of the run."""
  if formats is None:
    return result_lib.read_result(folder / result_lib.RESULT_FILE)['formats']
  return files.read_formats(formats_field(formats))
