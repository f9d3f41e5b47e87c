"""Evaluation: of the state at hand, or of a checkpoint."""

from collections.abc import Callable, Mapping, Sequence
import math
from typing import Any

from etils import epath
import jax
import ml_collections
import numpy as np

from fliqs_jax.errors import ConfigError, Problems
from fliqs_jax.layers.architecture import searched
from fliqs_jax.runs import compilation, files, network, supernet, workdir
from fliqs_jax.runs import result as result_lib
from fliqs_jax.runs.checkpoints import Checkpoints
from fliqs_jax.runs.config import complete
from fliqs_jax.runs.preparation import attempt_build, configured_data
from fliqs_jax.runs.setup import Setup
from fliqs_jax.runs.validation import OWN_BATCHES
from fliqs_jax.training import sharding, steps
from fliqs_jax.training.train_state import TrainState, create_train_state

_STEPS_AHEAD = 3

# (state, choices int32[N]) -> means over all examples, and their number
Evaluate = Callable[[TrainState, np.ndarray], dict[str, float]]


def initial_state(setup: Setup, mesh: jax.sharding.Mesh, seed: int) -> TrainState:
  """Returns the state before the first step, placed on the mesh."""
  compilation.keep_programs(setup.config.compilation_cache)
  init, own = _init(setup)
  init = jax.jit(init, out_shardings=placement(setup, mesh))
  if jax.process_count() > 1:  # arrays of one process are none of all of them
    own = jax.device_get(own)
  own = sharding.place(own, sharding.replicated(mesh), whole=True)
  return init(jax.random.key(seed), own)


def placement(setup: Setup, mesh: jax.sharding.Mesh) -> Any:
  """Returns the shardings of the leaves of a state, or the one of all of them."""
  if mesh.shape['fsdp'] == 1:
    return sharding.replicated(mesh)
  init, own = _init(setup)
  shapes = jax.eval_shape(init, jax.random.key(0), own)
  return sharding.state_sharding(shapes, mesh)


def abstract_state(setup: Setup, mesh: jax.sharding.Mesh) -> TrainState:
  """Returns the shapes, dtypes and shardings of a state, without computing one."""
  compilation.keep_programs(setup.config.compilation_cache)
  init, own = _init(setup)
  shapes = jax.eval_shape(init, jax.random.key(0), own)
  return jax.tree.map(
    lambda leaf, placed: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed),
    shapes,
    sharding.state_sharding(shapes, mesh),
  )


def _init(setup):
  """Returns the function from a key and a network's own variables, and the latter."""

  def init(key, variables):
    return create_train_state(
      setup.model, setup.example, setup.optimizer, setup.controller, key, variables
    )

  # A network of NNX has its weights already, which are no constants of a program.
  return init, network.own_variables(setup.model, setup.example)


def restored_state(
  setup: Setup, folder: epath.Path
) -> tuple[TrainState, jax.sharding.Mesh]:
  """Returns a state with the variables of a run's newest checkpoint, and its mesh.

  Of the state there is no more than these.

  Raises:
    ConfigError: where there is no checkpoint.
  """
  mesh = sharding.make_mesh(1, fsdp=setup.config.fsdp)
  with Checkpoints(folder, read_only=True) as checkpoints:
    if checkpoints.latest_step() is None:
      raise ConfigError(f'{str(folder)!r} holds no checkpoint to evaluate')
    state = checkpoints.restore_variables(abstract_state(setup, mesh))
  return _variables_alone(state), mesh


def _variables_alone(state):
  return state.replace(
    step=None,
    opt_state=None,
    controller=None,
    skipped=None,
    key=None,
    averaged_params=None,
  )


def make_evaluate(setup: Setup, mesh: jax.sharding.Mesh) -> Evaluate:
  """Returns the evaluation of a run, which compiles once for all choices.

  It raises FloatingPointError where one of the means is not finite.
  """
  eval_step = steps.make_eval_step(setup.task, setup.space, mesh)
  split = sharding.eval_sharding(mesh)

  def evaluate(state: TrainState, choices: np.ndarray) -> dict[str, float]:
    choices = jax.device_put(choices, sharding.replicated(mesh))
    sums = []
    for batch in setup.data.evaluation(split):
      # A last batch may be too small to be split over the devices.
      parts = 1 if setup.data.whole else jax.process_count()
      uneven = jax.tree.leaves(batch)[0].shape[0] * parts % mesh.size
      placed = sharding.replicated(mesh) if uneven else split
      batch = sharding.place(batch, placed, setup.data.whole)
      sums.append(eval_step(state, choices, batch))
      # Many programs that wait for each other's devices would block them all.
      jax.block_until_ready(sums[-_STEPS_AHEAD:][0])
    return means(jax.device_get(sums))

  return evaluate


def means(sums: Sequence[Mapping[str, Any]]) -> dict[str, float]:
  """Returns the means over all examples, and their number, of the sums of batches.

  Raises:
    FloatingPointError: where one of the means is not finite.
  """
  totals = jax.tree.map(lambda *values: sum(map(float, values)), *sums)
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
  config: ml_collections.ConfigDict, folder: epath.Path
) -> dict[str, Any]:
  """Evaluates a checkpoint under its own formats or given ones; returns the result.

  Args:
    config: resolved, whose mode is `eval`.
    folder: of the result, and of the checkpoint where the config names no other.

  Raises:
    ConfigError: with all that stands in the way.
    RunError: where no checkpoint can be read.
    FloatingPointError: where a mean is not finite.
  """
  source = files.to_path(config.checkpoint) if config.checkpoint else folder
  setup, state, mesh = _evaluated(config, source)
  choices = np.zeros(0, np.int32)
  evaluated = make_evaluate(setup, mesh)(state, choices)
  result = result_lib.make_result(setup, choices, None, evaluated)
  if jax.process_index() == 0:
    workdir.write(folder, result_lib.EVAL_FILE, result)
  return result


def finished_run(folder: epath.Path) -> tuple[Setup, TrainState, dict[str, Any]]:
  """Returns a finished run, under its own formats: its setup, state and result.

  Raises:
    ConfigError: where the folder holds no such run, or one of a network and batches
      that only the program in Python has which made it.
    RunError: where no checkpoint can be read.
  """
  config = complete(workdir.read_config(folder))
  if not (folder / result_lib.RESULT_FILE).exists():
    raise ConfigError(
      f'{str(folder)!r} holds an unfinished run, without {result_lib.RESULT_FILE}: '
      'expected one that was run to its end'
    )
  result = result_lib.read_result(folder / result_lib.RESULT_FILE)
  if config.dataset == OWN_BATCHES:
    raise ConfigError(
      f'{str(folder)!r} holds a run of fliqs_jax.{config.mode}, whose network and '
      'batches no file has: expected that program to call export of its result'
    )
  # The result says formats and architecture; files that the run was given may be gone.
  with config.unlocked():
    config.update(
      mode='eval',
      checkpoint=str(folder),
      formats='',
      architecture='',
      init_from='',
      fsdp=1,
    )
  setup, state, _ = _evaluated(config, folder)
  return setup, state, result


def _evaluated(config, source):
  """Returns the setup, the state and the mesh of an evaluation of a run."""
  problems = Problems()
  formats = problems.attempt(_evaluated_formats, config, source)
  architecture = problems.attempt(_evaluated_architecture, config, source)
  setup = attempt_build(problems, config, formats or 'float32', architecture)
  data = configured_data(problems, config)
  setup = setup._replace(data=data)
  return setup, *_evaluated_state(setup, source)


def _evaluated_architecture(config, source):
  if not (source / workdir.CONFIG_FILE).exists():
    return {}  # which `_evaluated_formats` reports
  trained = workdir.read_config(source)
  return supernet.evaluated_architecture(config, source, trained)


def _evaluated_state(setup, source):
  if not supernet.holds_supernet(workdir.read_config(source)):
    return restored_state(setup, source)
  model = network.build_model(setup.config, choose=searched)
  whole, mesh = restored_state(setup._replace(model=model), source)
  small = _variables_alone(abstract_state(setup, mesh))
  return supernet.slice_state(whole, small), mesh


def _evaluated_formats(config, source):
  """Returns the given formats, or those of the run in `source`."""
  workdir.check_model(config, source)
  if config.formats:
    return files.read_formats(config.formats)
  if not (source / result_lib.RESULT_FILE).exists():
    raise ConfigError(
      f'{str(source)!r} holds no {result_lib.RESULT_FILE}, since its run is not '
      'finished: give the formats to evaluate with --config.formats'
    )
  return result_lib.read_result(source / result_lib.RESULT_FILE)['formats']
