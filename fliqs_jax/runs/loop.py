"""The one loop, for search and for fixed formats, and what comes before and after."""

from collections.abc import Callable
import itertools
import logging
from typing import Any

from etils import epath
import grain
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from fliqs_jax.runs import assembly, evaluation
from fliqs_jax.runs import setup as plans
from fliqs_jax.search import budget
from fliqs_jax.training import health
from fliqs_jax.training import sharding as meshes
from fliqs_jax.runs import pretrained
from fliqs_jax.runs import result as results
from fliqs_jax.runs import workdir as workdirs
from fliqs_jax.training import steps
from fliqs_jax.runs.checkpoints import Checkpoints
from fliqs_jax.errors import ConfigError
from fliqs_jax.runs.config import resolve
from fliqs_jax.search.controller import policy_probabilities
from fliqs_jax.runs.distributed import Preemption
from fliqs_jax.runs.progress import Progress
from fliqs_jax.errors import Preempted
from fliqs_jax.runs.setup import Plan
from fliqs_jax.training.train_state import TrainState

_logger = logging.getLogger(__name__)

_STEPS_AHEAD = 3


def run(
  config: ml_collections.ConfigDict, workdir: str, allow_config_change: bool = False
) -> dict[str, Any]:
  """Runs what `config.mode` says and returns the result.

  A workdir that holds an unfinished run is resumed; that of a finished run is left as
  it is, and its result returned.

  Args:
    config: unresolved.
    workdir: folder for all files, made if it is not there.
    allow_config_change: resume although the workdir's config differs.

  Raises:
    ConfigError: for whatever the user can mend; nothing was written then.
    RunError: where the run cannot go on: its disk or its checkpoints.
    FloatingPointError: where its numbers are not finite.
    Preempted: where SIGTERM stopped it; the same call resumes it.
  """
  config = resolve(config)
  workdir = epath.Path(workdir)
  if config.mode == 'eval':
    return evaluation.evaluate_checkpoint(config, workdir)
  plan = plans.check(config, workdir, allow_config_change)
  return run_plan(config, workdir, plan)


def run_plan(
  config: ml_collections.ConfigDict, workdir: epath.Path, plan: Plan
) -> dict[str, Any]:
  """Trains what was checked, resuming as `run` does, and returns the result."""
  path = workdir / results.RESULT_FILE
  if path.exists():
    result = results.read_result(path)
    if result.get('config') == results.config_to_json(config):
      _logger.info('The run in %s is finished.', workdir)
      return result
  with workdirs.lock(workdir):
    if jax.process_index() == 0:
      workdirs.write(workdir, workdirs.CONFIG_FILE, results.config_to_json(config))
    return _train(config, workdir, plan)


def _train(config, workdir, plan):
  """Trains from the newest checkpoint, or from the start, to the result."""
  setup, data, start = plan
  num_samples = config.search.num_samples if setup.problem else 1
  mesh = meshes.make_mesh(num_samples)
  state = evaluation.initial_state(setup, mesh, config.seed)
  if start:
    state = pretrained.start_from(state, start)
  batches = data.train(config.seed, meshes.batch_sharding(mesh))
  with Checkpoints(workdir) as checkpoints:
    if checkpoints.latest_step() is not None:
      state = checkpoints.restore(state, batches)
      _logger.info('Resuming at step %d.', int(state.step))
    if int(state.step) < config.num_steps:
      step_fn = _make_step(config, setup, mesh)
      state = _loop(config, workdir, setup, mesh, state, batches, step_fn, checkpoints)
      choices, _ = _final_choices(config, setup, state)
      _logger.info('Re-estimating batch norm and evaluating.')
      state = _reestimate(config, setup, mesh, data, state, choices)
      checkpoints.save(state, batches)
  choices, policy = _final_choices(config, setup, state)
  evaluated = evaluation.evaluate(setup, mesh, data, state, choices)
  result = results.make_result(config, setup, choices, policy, evaluated)
  if jax.process_index() == 0:
    workdirs.write(workdir, results.RESULT_FILE, result)
  return result


def _make_step(config, setup, mesh):
  if setup.problem:
    step = steps.make_search_step(
      setup.problem, setup.objective, config.search.num_samples, mesh
    )
  else:
    step = steps.make_train_step(
      setup.space, setup.objective, config.search.activation_delay, mesh
    )
  return steps.skip_unsound(step, mesh) if config.max_skipped_steps else step


def _loop(
  config: ml_collections.ConfigDict,
  workdir: epath.Path,
  setup: assembly.Setup,
  mesh: jax.sharding.Mesh,
  state: TrainState,
  batches: grain.DatasetIterator,
  step_fn: Callable,
  checkpoints: Checkpoints,
) -> TrainState:
  """Takes the steps from `state.step` to the last one; returns the state after it.

  Raises:
    Preempted: where SIGTERM came before the last step, once a checkpoint is saved.
  """
  start = int(state.step)
  sharding = meshes.batch_sharding(mesh)
  commits = setup.problem is not None and config.search.hard_budget
  with (
    workdirs.History(workdir, start) as history,
    Progress(start, config.num_steps) as progress,
    Preemption() as preemption,
  ):
    pending = []
    for step in range(start, config.num_steps):
      if commits and step == config.search.commit_step:
        state = _commit(setup, state, mesh)
      batch = jax.make_array_from_process_local_data(sharding, _next(batches, step))
      with jax.transfer_guard('disallow'):
        state, metrics = step_fn(state, batch)
      pending.append(metrics)
      # Steps are taken in the background. Only a few wait, so that their batches take
      # little memory and a run that must stop does so soon.
      jax.block_until_ready(pending[-_STEPS_AHEAD:][0])
      done = step + 1
      stop = preemption.reached(done) and done < config.num_steps
      save = stop or (done % config.checkpoint_every == 0 and done < config.num_steps)
      # A line before every checkpoint, so that a resumed run writes the same lines.
      if save or done % config.log_every == 0 or done == config.num_steps:
        row = _average(config, setup, pending, done, checkpoints)
        row['learning_rate'] = float(setup.learning_rate(step))
        history.write(done, row, _policy(setup, state))
        progress.update(done, row)
        pending = []
      if save:
        checkpoints.save(state, batches)
      if stop:
        raise Preempted(f'stopped by SIGTERM at step {done}: start me again to go on')
  return state


def _next(batches, step):
  for batch in batches:
    return batch
  raise ConfigError(
    f'the training batches ended after {step} steps: expected more, or fewer '
    'num_steps; a list, or a function that returns an iterator, starts over'
  )


def _average(config, setup, pending, step, checkpoints):
  """Returns the mean scalars; an error says where the run can go on from."""
  try:
    return health.average(
      pending, step, config.max_skipped_steps, setup.space.formats_of
    )
  except FloatingPointError as error:
    saved = checkpoints.latest_step()
    raise FloatingPointError(
      f'{error}; the last checkpoint is of step {saved or 0}: look for such values in '
      'the data, lower optimizer.learning_rate, lengthen search.activation_delay, or '
      'let max_skipped_steps be more'
    ) from None


def _policy(setup, state):
  if not setup.problem:
    return {}
  probabilities = policy_probabilities(
    jax.device_get(state.controller.logits), setup.space.valid
  )
  return results.policy_by_name(setup.space, np.asarray(probabilities))


def _commit(setup, state, mesh):
  """Fixes the likeliest choices within the target for the rest of the run."""
  choices = _likeliest_within_target(setup, state)
  commitment = jax.device_put(choices, meshes.replicated(mesh))
  return state.replace(controller=state.controller._replace(commitment=commitment))


def _likeliest_within_target(setup, state):
  logits = jax.device_get(state.controller.logits)
  policy = np.asarray(policy_probabilities(logits, setup.space.valid), np.float64)
  with np.errstate(divide='ignore'):
    log_policy = np.log(policy)
  return budget.most_likely_within(
    setup.space, setup.cost_model, log_policy, setup.target, setup.caps
  )


def _final_choices(config, setup, state):
  """Returns the final choices int32[N] and the policy that they are taken from."""
  if not setup.problem:
    return np.zeros(0, np.int32), None
  controller = jax.device_get(state.controller)
  policy = np.asarray(policy_probabilities(controller.logits, setup.space.valid))
  if config.search.hard_budget:
    return controller.commitment, policy
  return np.argmax(policy, axis=1).astype(np.int32), policy


def _reestimate(config, setup, mesh, data, state, choices):
  """Returns the state with batch norm's statistics under the final formats."""
  if not state.batch_stats:
    return state
  statistics_step = steps.make_statistics_step(setup.space, setup.objective, mesh)
  # An order of its own, so that doing it again after an interruption changes nothing.
  batches = data.train(config.seed + 1, meshes.batch_sharding(mesh))
  choices = jax.device_put(choices, meshes.replicated(mesh))
  total, count = jax.tree.map(jnp.zeros_like, state.batch_stats), 0
  for batch in itertools.islice(batches, config.search.statistics_batches):
    batch = jax.make_array_from_process_local_data(meshes.batch_sharding(mesh), batch)
    total = jax.tree.map(jnp.add, total, statistics_step(state, choices, batch))
    count += 1
  if not count:
    _logger.warning('No batches are left: batch norm keeps its moving averages.')
    return state
  mean = jax.tree.map(lambda a: a / count, total)
  return state.replace(batch_stats=mean)
