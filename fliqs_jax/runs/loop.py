"""The one loop, for search and for fixed formats, and what comes before and after."""

from collections.abc import Callable
import itertools
import logging
from typing import Any

from etils import epath
import jax
import ml_collections
import numpy as np

from fliqs_jax.data.batches import BatchIterator
from fliqs_jax.errors import ConfigError, Preempted
from fliqs_jax.layers.layer import to_json
from fliqs_jax.runs import (
  evaluation,
  files,
  post_training,
  preparation,
  pretrained,
  sensitivities,
  workdir,
)
from fliqs_jax.runs import result as result_lib
from fliqs_jax.runs.batch_norm import make_reestimate
from fliqs_jax.runs.checkpoints import Checkpoints
from fliqs_jax.runs.config import resolve
from fliqs_jax.runs.distributed import Preemption
from fliqs_jax.runs.progress import Progress
from fliqs_jax.runs.setup import Setup
from fliqs_jax.runs.validation import trains_nothing
from fliqs_jax.training import health, sharding, steps
from fliqs_jax.training.task import Batch, Metrics
from fliqs_jax.training.train_state import TrainState

_logger = logging.getLogger(__name__)

_STEPS_AHEAD = 3

Step = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def run(
  config: ml_collections.ConfigDict,
  folder: epath.PathLike,
  allow_config_change: bool = False,
) -> dict[str, Any]:
  """Runs what `config.mode` says and returns the result.

  A workdir that holds an unfinished run is resumed; that of a finished run is left as
  it is, and its result returned.

  Args:
    config: unresolved.
    folder: the workdir for all files, made if it is not there.
    allow_config_change: resume although the workdir's config differs.

  Raises:
    ConfigError: for whatever the user can mend; nothing was written then.
    RunError: where the run cannot go on: its disk or its checkpoints.
    FloatingPointError: where its numbers are not finite.
    Preempted: where SIGTERM or SIGINT stopped it; the same call resumes it.
  """
  config, folder = resolve(config), files.to_path(folder)
  if config.mode == 'eval':
    return evaluation.evaluate_checkpoint(config, folder)
  return train(preparation.prepare(config, folder, allow_config_change), folder)


def train(
  setup: Setup, folder: epath.Path, shared: epath.Path | None = None
) -> dict[str, Any]:
  """Trains what was prepared, resuming as `run` does, and returns the result.

  Args:
    setup: of the run.
    folder: the workdir.
    shared: the folder of `train_to_commitment`, from whose checkpoint the run starts;
      None to take these steps too.
  """
  config = result_lib.config_to_json(setup.config)
  path = folder / result_lib.RESULT_FILE
  if path.exists():
    result = result_lib.read_result(path)
    if workdir.same_run(result.get('config') or {}, config):
      _logger.info('The run in %s is finished.', folder)
      return result
  with workdir.lock(folder):
    if trains_nothing(setup.config):
      # Before anything is written, since no formats may do.
      found = post_training.find(setup, folder)
      _write_inputs(setup, folder)
      result = post_training.save(setup, found, folder)
    else:
      _write_inputs(setup, folder)
      result = _train(setup, folder, shared)
    if jax.process_index() == 0:
      workdir.write(folder, result_lib.RESULT_FILE, result)
  return result


def train_to_commitment(setup: Setup, folder: epath.Path) -> None:
  """Takes the steps of a search before its commitment, resuming as `run` does.

  Args:
    setup: of a search.
    folder: for the checkpoint of the last one of these steps.
  """
  mesh = sharding.make_mesh(setup.num_samples, fsdp=setup.config.fsdp)
  with workdir.lock(folder):
    _write_inputs(setup, folder)
    with Checkpoints(folder) as checkpoints:
      state, batches = _start(setup, mesh, checkpoints)
      if int(state.step) >= setup.commit_step:
        return
      evaluate, end = evaluation.make_evaluate(setup, mesh), setup.commit_step
      with workdir.History(folder, int(state.step)) as history:
        state = _loop(setup, mesh, state, batches, evaluate, history, checkpoints, end)
      checkpoints.save(state, batches)


def _write_inputs(setup, folder):
  """Writes what runs in a folder: the config, the layers, the files that it names."""
  if jax.process_index() == 0:
    config = result_lib.config_to_json(setup.config)
    workdir.write(folder, workdir.CONFIG_FILE, config)
    workdir.write(folder, workdir.LAYERS_FILE, to_json(setup.standard_layers))
    workdir.keep_inputs(setup.config, folder)


def _start(setup, mesh, checkpoints, shared=None):
  """Returns the state of the newest checkpoint, or the first one, and the batches."""
  batches = setup.data.train(setup.config.seed, sharding.batch_sharding(mesh))
  if checkpoints.latest_step() is not None:
    state = checkpoints.restore(evaluation.abstract_state(setup, mesh), batches)
    _logger.info('Resuming at step %d.', int(state.step))
    return state, batches
  if shared is not None:
    with Checkpoints(shared) as others:
      if others.latest_step() is not None:  # none where no step comes before
        return others.restore(evaluation.abstract_state(setup, mesh), batches), batches
  state = evaluation.initial_state(setup, mesh, setup.config.seed)
  if setup.start:
    state = pretrained.start_from(state, setup.start)
  return state, batches


def _train(setup, folder, shared):
  """Trains from the newest checkpoint, or from the start, to the result."""
  config = setup.config
  mesh = sharding.make_mesh(setup.num_samples, fsdp=config.fsdp)
  last = config.num_steps
  evaluate = evaluation.make_evaluate(setup, mesh)
  with Checkpoints(folder) as checkpoints:
    state, batches = _start(setup, mesh, checkpoints, shared)
    with workdir.History(folder, int(state.step)) as history:
      if int(state.step) < last:
        state = _loop(setup, mesh, state, batches, evaluate, history, checkpoints, last)
        choices, _ = _final_choices(setup, state)
        _logger.info('Re-estimating batch norm and evaluating.')
        state = _reestimate(setup, mesh, state, choices)
        checkpoints.save(state, batches)
      choices, policy = _final_choices(setup, state)
      evaluated = evaluate(state, choices)
      history.write_evaluation(last, evaluated)
  result = result_lib.make_result(setup, choices, policy, evaluated)
  return result | sensitivities.of_training(setup, state)


def make_step(setup: Setup, mesh: jax.sharding.Mesh) -> Step:
  """Returns the jitted step of a run, `(state, batch) -> (state, metrics)`."""
  config, placed = setup.config, evaluation.placement(setup, mesh)
  if setup.controller:
    step = steps.make_search_step(
      setup.task,
      setup.space,
      setup.cost_model,
      setup.controller,
      mesh,
      num_samples=setup.num_samples,
      activation_delay=config.search.activation_delay,
      weight_delay=config.search.weight_delay,
      averaged_steps=_averaged_steps(config.search),
      held_out=config.reward.split == 'validation',
      placed=placed,
    )
  else:
    step = steps.make_train_step(
      setup.task,
      setup.space,
      mesh,
      config.search.activation_delay,
      config.search.weight_delay,
      placed,
    )
  return steps.skip_unsound(step, mesh, placed) if config.max_skipped_steps else step


def _averaged_steps(search):
  """Half of the steps in which qualities are measured."""
  return max((search.commit_step - search.policy_delay) // 2, 1)


def _loop(
  setup: Setup,
  mesh: jax.sharding.Mesh,
  state: TrainState,
  batches: BatchIterator,
  evaluate: evaluation.Evaluate,
  history: workdir.History,
  checkpoints: Checkpoints,
  end: int,
) -> TrainState:
  """Takes the steps from `state.step` on and before `end`; returns the state then.

  Raises:
    Preempted: where SIGTERM or SIGINT came before the last step, once a checkpoint
      is saved.
  """
  start, config = int(state.step), setup.config
  step_fn, placed = make_step(setup, mesh), sharding.batch_sharding(mesh)
  with (
    Progress(start, end) as progress,
    Preemption() as preemption,
  ):
    pending = []
    for step in range(start, end):
      if step == setup.commit_step:
        state = _commit(setup, state, mesh)
      batch = sharding.place(_next(batches, step), placed, setup.data.whole)
      with jax.transfer_guard('disallow'):
        state, metrics = step_fn(state, batch)
      pending.append(metrics)
      if step == start:
        jax.block_until_ready(metrics)
        progress.begin(step + 1)
      # Steps are taken in the background. Only a few wait, so that their batches take
      # little memory and a run that must stop does so soon.
      jax.block_until_ready(pending[-_STEPS_AHEAD:][0])
      done = step + 1
      # Steps that are shared end before the run does.
      stop = preemption.reached(done) and done < config.num_steps
      save = stop or (done % config.checkpoint_every == 0 and done < end)
      # A line before every checkpoint, so that a resumed run writes the same lines.
      meanwhile = config.eval_every and done % config.eval_every == 0
      if save or meanwhile or done % config.log_every == 0 or done == end:
        row = _average(setup, pending, done, checkpoints)
        row['learning_rate'] = float(setup.learning_rate(step))
        if meanwhile and done < end:
          row |= _evaluated_meanwhile(setup, state, evaluate)
        policy = result_lib.policy_by_name(setup.space, _policy(setup, state))
        history.write(done, row, policy)
        progress.update(done, row)
        pending = []
      if save:
        checkpoints.save(state, batches)
      if stop:
        name = preemption.signal_name
        raise Preempted(f'stopped by {name} at step {done}: start me again to go on')
  return state


def _evaluated_meanwhile(setup, state, evaluate):
  """Returns the scalars of a line that evaluate the formats as they stand."""
  choices, _ = _final_choices(setup, state)
  if (choices < 0).any():  # nothing is committed to yet
    choices = _best_choices(setup, state)
  evaluated = evaluate(state, choices)
  return {
    workdir.EVALUATED + name: value
    for name, value in evaluated.items()
    if name != 'num_examples'
  }


def _next(batches, step):
  for batch in batches:
    return batch
  raise ConfigError(
    f'the training batches ended after {step} steps: expected more, or fewer '
    'num_steps; a list, or a function that returns an iterator, starts over'
  )


def _average(setup, pending, step, checkpoints):
  """Returns the mean scalars; an error says where the run can go on from."""
  try:
    row = health.average(
      pending, step, setup.config.max_skipped_steps, setup.space.formats_of
    )
  except FloatingPointError as error:
    saved = checkpoints.latest_step()
    raise FloatingPointError(
      f'{error}; the last checkpoint is of step {saved or 0}: look for such values in '
      'the data, lower optimizer.learning_rate, lengthen search.activation_delay, or '
      'let max_skipped_steps be more'
    ) from None
  if 'cost' in row:
    row['cost_ratio'] = row['cost'] / setup.target
  return row


def _policy(setup, state):
  """Returns the policy float32[N, K] in numpy, None where formats are fixed."""
  if not setup.controller:
    return None
  return np.asarray(setup.controller.policy(jax.device_get(state.controller)))


def _commit(setup, state, mesh):
  """Fixes the best choices within the budgets for the rest of the run."""
  choices = jax.device_put(_best_choices(setup, state), sharding.replicated(mesh))
  return state.replace(controller=setup.controller.commit(state.controller, choices))


def _best_choices(setup, state):
  """Returns the best choices within the budgets, int32[N], by what is known so far."""
  scores = setup.controller.scores(jax.device_get(state.controller))
  return setup.problem.best_choices(jax.device_get(scores))


def _final_choices(setup, state):
  """Returns the final choices int32[N] and the policy that they are taken from."""
  if not setup.controller:
    return np.zeros(0, np.int32), None
  choices = setup.controller.final_choices(jax.device_get(state.controller))
  return np.asarray(choices), _policy(setup, state)


def _reestimate(setup, mesh, state, choices):
  """Returns the state with batch norm's statistics under the final formats."""
  # An order of its own, so that doing it again after an interruption changes nothing.
  batches = setup.data.train(setup.config.seed + 1, sharding.batch_sharding(mesh))
  batches = itertools.islice(batches, setup.config.search.statistics_batches)
  return make_reestimate(setup, mesh)(state, choices, batches)
