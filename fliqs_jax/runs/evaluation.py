"""Evaluation: of the state at hand, or of a checkpoint."""

import math
from typing import Any

from etils import epath
import jax
import ml_collections
import numpy as np

from fliqs_jax.runs import assembly, files, networks
from fliqs_jax.runs import result as results
from fliqs_jax.runs import setup as plans
from fliqs_jax.training import steps
from fliqs_jax.training import sharding as meshes
from fliqs_jax.runs import subnetwork as subnetworks
from fliqs_jax.runs import workdir as workdirs
from fliqs_jax.layers.architecture import searched
from fliqs_jax.runs.checkpoints import Checkpoints
from fliqs_jax.errors import ConfigError
from fliqs_jax.runs.setup import Attempts, Data
from fliqs_jax.training.train_state import TrainState, create_train_state


def initial_state(
  setup: assembly.Setup, mesh: jax.sharding.Mesh, seed: int
) -> TrainState:
  """Returns the state before the first step, on all devices."""

  def init(key):
    return create_train_state(
      setup.model,
      setup.example,
      setup.optimizer,
      setup.problem and setup.problem.controller,
      key,
    )

  init = jax.jit(init, out_shardings=meshes.replicated(mesh))
  return init(jax.random.key(seed))


def restored_state(
  setup: assembly.Setup, workdir: epath.Path
) -> tuple[TrainState, jax.sharding.Mesh]:
  """Returns a state with the variables of a run's newest checkpoint, and its mesh.

  Raises:
    ConfigError: where there is no checkpoint.
  """
  mesh = meshes.make_mesh(1)
  state = initial_state(setup, mesh, 0)
  with Checkpoints(workdir, read_only=True) as checkpoints:
    if checkpoints.latest_step() is None:
      raise ConfigError(f'{str(workdir)!r} holds no checkpoint to evaluate')
    return checkpoints.restore_variables(state), mesh


def evaluate(
  setup: assembly.Setup,
  mesh: jax.sharding.Mesh,
  data: Data,
  state: TrainState,
  choices: np.ndarray,
) -> dict[str, float]:
  """Returns the means over all examples of the evaluation, and their number.

  Raises:
    FloatingPointError: where one of the means is not finite.
  """
  eval_step = steps.make_eval_step(setup.space, setup.objective, mesh)
  choices = jax.device_put(choices, meshes.replicated(mesh))
  sums = []
  sharding = meshes.eval_sharding(mesh)
  for batch in data.evaluation(sharding):
    # A last batch may be too small to be split over the devices.
    uneven = jax.tree.leaves(batch)[0].shape[0] * jax.process_count() % mesh.size
    placed = meshes.replicated(mesh) if uneven else sharding
    batch = jax.make_array_from_process_local_data(placed, batch)
    sums.append(eval_step(state, choices, batch))
  totals = jax.tree.map(lambda *values: sum(map(float, values)), *jax.device_get(sums))
  num_examples = int(totals.pop('num_examples'))
  means = {name: total / num_examples for name, total in totals.items()}
  for name, mean in means.items():
    if not math.isfinite(mean):
      raise FloatingPointError(
        f'{name} is {mean} over the {num_examples} examples of the evaluation: look '
        'for such values in its data, or lower optimizer.learning_rate'
      )
  return {**means, 'num_examples': num_examples}


def evaluate_checkpoint(
  config: ml_collections.ConfigDict, workdir: epath.Path
) -> dict[str, Any]:
  """Evaluates a checkpoint under its own formats or given ones; returns the result.

  Args:
    config: resolved, whose mode is `eval`.
    workdir: of the result, and of the checkpoint where the config names no other.

  Raises:
    ConfigError: with all that stands in the way.
    RunError: where no checkpoint can be read.
    FloatingPointError: as `evaluate` does.
  """
  source = epath.Path(config.checkpoint) if config.checkpoint else workdir
  attempt = Attempts()
  assignment = attempt(_evaluated_formats, config, source)
  architecture = attempt(_evaluated_architecture, config, source)
  if architecture is None:  # what else is wrong shows in the standard network
    architecture, assignment = {}, 'float32'
  setup = attempt(
    assembly.build,
    config,
    jax.device_count(),
    assignment or 'float32',
    None,
    architecture,
  )
  data = plans.configured_data(config, attempt)
  choices = np.zeros(0, np.int32)
  state, mesh = _evaluated_state(config, setup, source)
  evaluation = evaluate(setup, mesh, data, state, choices)
  result = results.make_result(config, setup, choices, None, evaluation)
  if jax.process_index() == 0:
    workdirs.write(workdir, results.EVAL_FILE, result)
  return result


def _evaluated_architecture(config, source):
  if not (source / workdirs.CONFIG_FILE).exists():
    return {}  # which `_evaluated_formats` reports
  trained = workdirs.read_config(source)
  return subnetworks.evaluated_architecture(config, source, trained)


def _evaluated_state(config, setup, source):
  if not subnetworks.holds_supernet(workdirs.read_config(source)):
    return restored_state(setup, source)
  model, _ = networks.build_model(config, choose=searched)
  supernet, mesh = restored_state(setup._replace(model=model), source)
  return subnetworks.slice_state(supernet, initial_state(setup, mesh, 0)), mesh


def _evaluated_formats(config, source):
  """Returns the given formats, or those of the run in `source`."""
  workdirs.check_model(config, source)
  if config.formats:
    return files.read_formats(config.formats)
  if not (source / results.RESULT_FILE).exists():
    raise ValueError(
      f'{str(source)!r} holds no {results.RESULT_FILE}, since its run is not '
      'finished: give the formats to evaluate with --config.formats'
    )
  return results.read_result(source / results.RESULT_FILE)['formats']
