"""The one loop, for search and for fixed formats, and what comes before and after."""

from collections.abc import Callable, Iterable
import functools
import itertools
import logging
from typing import Any, NamedTuple

from etils import epath
import grain
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from fliqs_jax import assembly, assignments, budget, display, health, input_pipeline
from fliqs_jax import pretrained, results, steps, subnetworks, workdirs
from fliqs_jax.architecture import searched
from fliqs_jax.checkpoints import Checkpoints
from fliqs_jax.config import ConfigError, resolve
from fliqs_jax.controller import policy_probabilities
from fliqs_jax.distributed import Preemption
from fliqs_jax.errors import Preempted
from fliqs_jax.train_state import TrainState, create_train_state

_logger = logging.getLogger(__name__)

_STEPS_AHEAD = 3


class Data(NamedTuple):
  """Where a run's batches come from, numpy arrays in dicts."""

  # (seed, sharding) -> this process's part of batches `[S, B, ...]`, in the order that
  # the seed sets. The iterator tells and takes its position.
  train: Callable[[int, jax.sharding.Sharding], grain.DatasetIterator]
  # (sharding) -> its part of batches `[B, ...]` that have each example once.
  evaluation: Callable[[jax.sharding.Sharding], Iterable[steps.Batch]]


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
    return _evaluate_checkpoint(config, workdir)
  plan = check(config, workdir, allow_config_change)
  return run_plan(config, workdir, plan)


class Plan(NamedTuple):
  """What a run needs besides its config."""

  setup: assembly.Setup
  data: Data
  start: pretrained.Variables | None  # None for random variables


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


def check(
  config: ml_collections.ConfigDict,
  workdir: epath.Path,
  allow_config_change: bool = False,
) -> Plan:
  """Returns what a run needs; prepares a packaged dataset.

  Args:
    config: resolved, to search or to train.
    workdir: of the run, in which nothing is written.
    allow_config_change: accept a workdir whose config differs.

  Raises:
    ConfigError: with all that stands in the way of the run.
  """
  attempt = Attempts()
  fixed = attempt(_fixed_formats, config)
  if config.mode == 'train':
    fixed = fixed or 'float32'
  architecture = attempt(subnetworks.read_architecture, config) or {}
  setup = attempt(assembly.build, config, jax.device_count(), fixed, None, architecture)
  start = check_start(attempt, config, setup)
  attempt(workdirs.check, config, workdir, allow_config_change)
  return Plan(setup, _configured_data(config, attempt), start)


def check_start(
  attempt: 'Attempts',
  config: ml_collections.ConfigDict,
  setup: assembly.Setup | None,
  given: pretrained.Variables | None = None,
) -> pretrained.Variables | None:
  """Returns the variables to start from: given ones, or those that the config names."""
  start = given or attempt(pretrained.read, config.init_from)
  if setup and start:
    attempt(pretrained.check, setup.model, setup.example, start)
  return start


def _configured_data(config, attempt):
  """Returns the batches of a dataset; raises all problems."""
  builder = attempt(input_pipeline.find_builder, config)
  attempt.raise_problems()
  attempt(input_pipeline.prepare, config, builder)
  attempt.raise_problems()
  return Data(
    functools.partial(input_pipeline.train_batches, config, builder),
    functools.partial(input_pipeline.eval_batches, config, builder),
  )


def _fixed_formats(config):
  if config.mode == 'search' and config.formats:
    raise ValueError(
      f'formats={config.formats!r} would have no effect on a search: expected them '
      'with --config.mode=train or eval'
    )
  if config.mode == 'train' and not config.formats:
    raise ValueError(
      'mode=train: expected formats, as --config.formats=int8, float32 for none, or '
      'the path of a formats.json or a search_result.json'
    )
  return assignments.read(config.formats) if config.formats else None


def _train(config, workdir, plan):
  """Trains from the newest checkpoint, or from the start, to the result."""
  setup, data, start = plan
  num_samples = config.search.num_samples if setup.problem else 1
  mesh = steps.make_mesh(num_samples)
  state = initial_state(setup, mesh, config.seed)
  if start:
    state = pretrained.start_from(state, start)
  batches = data.train(config.seed, steps.batch_sharding(mesh))
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
  evaluation = evaluate(setup, mesh, data, state, choices)
  result = results.make_result(config, setup, choices, policy, evaluation)
  if jax.process_index() == 0:
    workdirs.write(workdir, results.RESULT_FILE, result)
  return result


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

  init = jax.jit(init, out_shardings=steps.replicated(mesh))
  return init(jax.random.key(seed))


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
  sharding = steps.batch_sharding(mesh)
  commits = setup.problem is not None and config.search.hard_budget
  with (
    workdirs.History(workdir, start) as history,
    display.Progress(start, config.num_steps) as progress,
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
      f'{error}; the last checkpoint is of step {saved or 0}: lower '
      'optimizer.learning_rate, lengthen search.activation_delay, or let '
      'max_skipped_steps be more'
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
  commitment = jax.device_put(choices, steps.replicated(mesh))
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
  batches = data.train(config.seed + 1, steps.batch_sharding(mesh))
  choices = jax.device_put(choices, steps.replicated(mesh))
  total, count = jax.tree.map(jnp.zeros_like, state.batch_stats), 0
  for batch in itertools.islice(batches, config.search.statistics_batches):
    batch = jax.make_array_from_process_local_data(steps.batch_sharding(mesh), batch)
    total = jax.tree.map(jnp.add, total, statistics_step(state, choices, batch))
    count += 1
  if not count:
    _logger.warning('No batches are left: batch norm keeps its moving averages.')
    return state
  mean = jax.tree.map(lambda a: a / count, total)
  return state.replace(batch_stats=mean)


def restored_state(
  setup: assembly.Setup, workdir: epath.Path
) -> tuple[TrainState, jax.sharding.Mesh]:
  """Returns a state with the variables of a run's newest checkpoint, and its mesh.

  Raises:
    ConfigError: where there is no checkpoint.
  """
  mesh = steps.make_mesh(1)
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
  """Returns the means over all examples of the evaluation, and their number."""
  eval_step = steps.make_eval_step(setup.space, setup.objective, mesh)
  choices = jax.device_put(choices, steps.replicated(mesh))
  sums = []
  sharding = steps.eval_sharding(mesh)
  for batch in data.evaluation(sharding):
    # A last batch may be too small to be split over the devices.
    uneven = jax.tree.leaves(batch)[0].shape[0] * jax.process_count() % mesh.size
    placed = steps.replicated(mesh) if uneven else sharding
    batch = jax.make_array_from_process_local_data(placed, batch)
    sums.append(eval_step(state, choices, batch))
  totals = jax.tree.map(lambda *values: sum(map(float, values)), *jax.device_get(sums))
  num_examples = int(totals.pop('num_examples'))
  return {
    **{name: total / num_examples for name, total in totals.items()},
    'num_examples': num_examples,
  }


def _evaluate_checkpoint(config, workdir):
  """Evaluates a checkpoint under its own formats or given ones."""
  source = epath.Path(config.checkpoint) if config.checkpoint else workdir
  attempt = Attempts()
  assignment = attempt(_evaluated_formats, config, source)
  architecture = attempt(_evaluated_architecture, config, source) or {}
  setup = attempt(
    assembly.build,
    config,
    jax.device_count(),
    assignment or 'float32',
    None,
    architecture,
  )
  data = _configured_data(config, attempt)
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
  model, _ = assembly.build_model(config, choose=searched)
  supernet, mesh = restored_state(setup._replace(model=model), source)
  return subnetworks.slice_state(supernet, initial_state(setup, mesh, 0)), mesh


def _evaluated_formats(config, source):
  """Returns the given formats, or those of the run in `source`."""
  trained = workdirs.read_config(source)
  if trained.model.to_dict() != results.config_to_json(config)['model']:
    raise ValueError(
      f'{str(source)!r} holds a checkpoint of model {trained.model.to_dict()}, but the '
      f'config has {config.model.to_dict()}'
    )
  if config.formats:
    return assignments.read(config.formats)
  if not (source / results.RESULT_FILE).exists():
    raise ValueError(
      f'{str(source)!r} holds no {results.RESULT_FILE}, since its run is not '
      'finished: give the formats to evaluate with --config.formats'
    )
  return results.read_result(source / results.RESULT_FILE)['formats']


class Attempts:
  """Calls functions and gathers their problems, to report all of them together."""

  def __init__(self):
    self.problems = []

  def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
    """Returns the function's result, or None where it raises a ValueError."""
    try:
      return function(*args)
    except ValueError as error:
      self.problems += str(error).splitlines()

  def raise_problems(self) -> None:
    """Raises ConfigError where there were problems."""
    if self.problems:
      raise ConfigError(*self.problems)
