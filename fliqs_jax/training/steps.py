"""The pure steps: search, training with fixed formats, statistics, evaluation.

A batch is a dict of arrays `[S, B, ...]`, for a classifier `image` and `label`, where
sample `s` of the policy sees slice `s`. A label is a class, int32[S, B], or the
probabilities of all classes, float32[S, B, num_classes]. Steps run on a mesh
`('sample', 'data', 'fsdp')`: each device scans its samples, and the devices of one
sample split its examples. Over `fsdp` they split the parameters too.
"""

from collections.abc import Callable
from typing import Any

from flax import traverse_util
import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
import optax

from fliqs_jax.errors import ConfigError
from fliqs_jax.layers.variables import FORMATS, QUANT_STATS, nest
from fliqs_jax.search.controller import Controller, Outcome
from fliqs_jax.search.cost_models import CostModel
from fliqs_jax.search.space import SearchSpace
from fliqs_jax.training import health
from fliqs_jax.training.sharding import batch_sharding, parameter_spec, replicated
from fliqs_jax.training.task import Batch, Metrics, Task, score_problem
from fliqs_jax.training.train_state import BATCH_STATS, TrainState

_INTERMEDIATES = 'intermediates'


def _forward(state, task, params, formats, batch, key):
  """Returns the outputs in training, the auxiliary ones, and updated statistics."""
  arguments = task.arguments(batch, True)
  outputs, updated = state.apply_fn(
    {'params': params, FORMATS: formats, **state.model_stats},
    *arguments.args,
    mutable=[*state.model_stats, _INTERMEDIATES],
    # Random streams of other names than dropout's fall back to that of `params`.
    rngs={'dropout': key, 'params': jax.random.fold_in(key, 2)},
    **arguments.kwargs,
  )
  auxiliary = []
  for path, sown in traverse_util.flatten_dict(updated.pop(_INTERMEDIATES, {})).items():
    if path[-1] == 'aux_logits':
      auxiliary += sown
  return outputs, auxiliary, updated


def _gradients(state, task, formats, batch, key):
  """Returns the gradients, the updated statistics and the metrics of one sample."""
  # Dropout keeps the key itself.
  batch = task.augment(batch, jax.random.fold_in(key, 1))

  def loss_fn(params):
    outputs, auxiliary, stats = _forward(state, task, params, formats, batch, key)
    loss = jnp.mean(task.loss(outputs, batch))
    for output in auxiliary:
      loss += task.auxiliary_weight * jnp.mean(task.loss(output, batch))
    # Here, since outputs may be of a class of the user's that JAX cannot return.
    outputs = jax.tree.map(_without_gradient, outputs)
    metrics = {
      'quality': jnp.mean(task.quality(outputs, batch)),
      **jax.tree.map(jnp.mean, task.metrics(outputs, batch)),
    }
    return loss, (stats, metrics)

  (loss, (stats, metrics)), gradients = jax.value_and_grad(loss_fn, has_aux=True)(
    state.params
  )
  return gradients, stats, {'loss': loss, **metrics}


def _without_gradient(leaf):
  return lax.stop_gradient(leaf) if isinstance(leaf, jax.Array) else leaf


def _mean_over_samples(function, mesh, shared, *per_sample):
  """Averages a function's first result over samples; its second stays per sample.

  Args:
    function: `(shared, *slices) -> (tree to average, tree to stack)`. It closes over
      no array: one from outside of the `shard_map` has another mesh, which the
      gradient of a scan within refuses.
    mesh: its `sample` axis splits the leading axis of `per_sample`.
    shared: tree of arrays that all samples see.
    *per_sample: trees of arrays `[S, ...]`.
  """

  # Its shapes are asked for before the scan, which then takes the same trace.
  function = jax.jit(function, inline=True)

  def on_one_device(shared, *local):
    num_local = jax.tree.leaves(local)[0].shape[0]
    first = lambda tree: jax.tree.map(lambda a: a[0], tree)
    if num_local == 1:
      mean, stacked = function(shared, *first(local))
      stacked = jax.tree.map(lambda a: a[None], stacked)
    else:
      # Scanned, not vmapped: a kernel for each sample would turn every convolution
      # into a grouped one, and memory would grow with the samples.
      def accumulate(total, slices):
        new, stacked = function(shared, *slices)
        return jax.tree.map(jnp.add, total, _split_as_params(new, mesh)), stacked

      shapes, _ = jax.eval_shape(function, shared, *first(local))
      zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
      zeros = _split_as_params(zeros, mesh)
      total, stacked = lax.scan(accumulate, zeros, local)
      mean = jax.tree.map(lambda a: (a / num_local).astype(a.dtype), total)
    split = _split_over_data if mesh.shape['fsdp'] == 1 else _split_as_params
    averaged = split(mean, mesh)
    if mesh.shape['sample'] > 1:  # XLA splits nothing along a manual axis of one
      averaged = lax.pmean(averaged, 'sample')
    # Counts among a network's variables stay whole.
    return jax.tree.map(lambda a, b: a.astype(b.dtype), averaged, mean), stacked

  # Only `sample` is manual. Over the rest the compiler partitions, so that the means of
  # batch norm and of the statistics are over all examples of a sample, and networks
  # need not know of any axis. Unchecked, because a checked gradient with respect to
  # the replicated weights would be reduced over devices for every sample, not once.
  mean, stacked = jax.shard_map(
    on_one_device,
    mesh=mesh,
    in_specs=(P(), *[P('sample')] * len(per_sample)),
    out_specs=(P(), P('sample')),
    axis_names={'sample'},
    check_vma=False,
  )(shared, *per_sample)
  if mesh.shape['fsdp'] == 1:
    return lax.with_sharding_constraint(mean, replicated(mesh)), stacked
  placed = lambda a: NamedSharding(mesh, parameter_spec(a, mesh))
  return lax.with_sharding_constraint(mean, jax.tree.map(placed, mean)), stacked


def _split_over_data(tree, mesh):
  """Splits the sums of a tree over the `data` axis.

  The compiler sums a kernel's gradient over `data` before it is averaged over
  `sample`. Split, the first sum is a reduce-scatter and the second one is of a part, so
  that a chip sends no more than for one sum over all devices, and not twice that.
  """
  size = mesh.shape['data']

  def split(array):
    axes = [i for i, n in enumerate(array.shape) if n % size == 0]
    if array.ndim < 2 or not axes:  # vectors are small
      return array
    whole = lax.with_sharding_constraint(array, P())
    return lax.with_sharding_constraint(whole, P(*[None] * axes[0], 'data'))

  return jax.tree.map(split, tree) if min(mesh.devices.shape[:2]) > 1 else tree


def _split_as_params(tree, mesh):
  """Splits gradients over the `fsdp` axis, so that no device has them all."""
  if mesh.shape['fsdp'] == 1:
    return tree
  split = lambda a: lax.with_sharding_constraint(a, parameter_spec(a, mesh))
  return jax.tree.map(split, tree)


def _apply(state, gradients, stats):
  stats = dict(stats)
  return state.apply_gradients(
    grads=gradients,
    batch_stats=stats.pop(BATCH_STATS, {}),
    quant_stats=stats.pop(QUANT_STATS, {}),
    collections=stats,
  )


def make_search_step(
  task: Task,
  space: SearchSpace,
  cost_model: CostModel,
  controller: Controller,
  mesh: Mesh,
  *,
  num_samples: int,
  activation_delay: int = 0,
  weight_delay: int = 0,
  averaged_steps: int = 1,
  held_out: bool = False,
  placed: Any = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
  """Returns the jitted step that updates weights and policy together.

  Sample `s` of step `t` depends on (key, t, s) alone, not on the mesh.

  Args:
    task: loss, quality, and what the network is fed.
    space: the search space.
    cost_model: what choices cost.
    controller: the policy.
    mesh: from `sharding.make_mesh`.
    num_samples: S, which the mesh's sample axis divides.
    activation_delay: the first step with quantized activations.
    weight_delay: the first step with quantized weights.
    averaged_steps: the time constant of the moving averages of the weights, under which
      a controller that measures does so.
    held_out: whether the quality is that of `batch['reward']`.
    placed: the shardings of the state's leaves; None for all of it on every device.

  Returns:
    `(state, batch) -> (state, metrics)`; the state is donated. Metrics are scalars,
    averaged over samples, and of each sample `sample_loss`, float32[S], and `choices`,
    int32[S, N].
  """
  measures = controller.is_measured is not None
  delays = activation_delay, weight_delay
  one_sample = _make_sample(task, space, delays, held_out and not measures)
  measure = _make_measure(task, space, mesh, held_out)

  def search_step(state, batch):
    step_key = jax.random.fold_in(state.key, state.step)
    policy_keys, model_keys = _sample_keys(step_key, num_samples)
    choices = controller.sample(state.controller, policy_keys)
    (gradients, stats), metrics = _mean_over_samples(
      one_sample, mesh, state, batch, choices, model_keys
    )
    outcome = Outcome(choices, metrics['quality'], cost_model(space, choices))
    if measures:
      measured = controller.is_measured(state.step)
      outcome = _measured(outcome, measured, measure, state, batch, step_key)
    policy, policy_metrics = controller.update(state.controller, outcome, state.step)
    new_state = _apply(state, gradients, stats).replace(controller=policy)
    if measures:
      new_state = _average_params(new_state, averaged_steps)
    return new_state, _search_metrics(metrics, outcome, gradients) | policy_metrics

  return _jit_step(search_step, mesh, placed)


def _make_sample(task, space, delays, held_out):
  """Returns `(state, batch, choices, key) -> ((gradients, stats), metrics)`."""

  def one_sample(state, batch, choices, key):
    activations, weights = (state.step >= delay for delay in delays)
    formats = nest(space.layers, space.bind(choices, activations, weights))
    gradients, stats, metrics = _gradients(state, task, formats, batch, key)
    if held_out:
      held = batch['reward']
      outputs, _, _ = _forward(state, task, state.params, formats, held, key)
      metrics['quality'] = jnp.mean(task.quality(outputs, held))
    return (gradients, stats), metrics

  return one_sample


def _average_params(state, num_steps):
  """Returns the state with moving averages that take its parameters in.

  At first they are the mean of all steps, so that no step before the first counts.
  """
  weight = 1 / jnp.minimum(state.step, num_steps)
  averaged = jax.tree.map(
    lambda average, p: average + weight * (p.astype(average.dtype) - average),
    state.averaged_params,
    state.params,
  )
  return state.replace(averaged_params=averaged)


def _measured(outcome, measured, measure, state, batch, key):
  """Returns the outcome with qualities that are measured, at the steps that do so."""
  qualities = lax.cond(
    measured,
    lambda: measure(state, batch, outcome.choices, key),
    lambda: outcome.qualities,
  )
  return outcome._replace(qualities=qualities, measured=measured)


def _make_measure(task, space, mesh, held_out):
  """Returns the function that measures samples on the same examples.

  It is `(state, batch, choices int32[S, N], key) -> float32[S]`. The examples are those
  of `batch['reward']` where it is held out, else half of the batch, before the weights
  train on it. Common random numbers take what the examples contribute to a quality out
  of the differences between samples. The weights are the averaged ones: their losses
  under formats are nearer to those of the weights in which the learning rate ends
  (Izmailov et al., 2018, arXiv 1803.05407) than those of any one step are.
  """

  def one_sample(shared, choices):
    state, examples, key = shared
    formats = nest(space.layers, space.bind(choices))
    outputs, _, _ = _forward(state, task, state.params, formats, examples, key)
    return {}, jnp.mean(task.quality(outputs, examples))

  def measure(state, batch, choices, key):
    if held_out:
      examples = batch['reward']
    else:
      half = max(jax.tree.leaves(batch)[0].shape[1] // 2, 1)
      examples = jax.tree.map(lambda a: a[:, :half], batch)
    examples = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), examples)
    averaged = jax.tree.map(
      # Nothing is averaged before the first step.
      lambda average, p: jnp.where(state.step > 0, average.astype(p.dtype), p),
      state.averaged_params,
      state.params,
    )
    shared = state.replace(params=averaged), examples, key
    _, qualities = _mean_over_samples(one_sample, mesh, shared, choices)
    return lax.with_sharding_constraint(qualities, replicated(mesh))

  return measure


def _search_metrics(metrics, outcome, gradients):
  """Returns the metrics of a search step but for the controller's."""
  return {
    **jax.tree.map(jnp.mean, metrics),
    'cost': jnp.mean(outcome.costs),
    'gradient_norm': optax.tree.norm(gradients),
    'sample_loss': metrics['loss'],
    'choices': outcome.choices,
  }


def _sample_keys(step_key, num_samples):
  """Returns the keys [S] of the policy and those of the network, of this step."""
  sample_keys = jax.vmap(lambda s: jax.random.fold_in(step_key, s))(
    jnp.arange(num_samples)
  )
  return jax.vmap(jax.random.split, out_axes=1)(sample_keys)


def make_train_step(
  task: Task,
  space: SearchSpace,
  mesh: Mesh,
  activation_delay: int = 0,
  weight_delay: int = 0,
  placed: Any = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
  """Returns the jitted step that trains the weights under fixed formats.

  Args:
    task: loss, quality, and what the network is fed.
    space: without decisions, from `fixed_space`.
    mesh: from `sharding.make_mesh`.
    activation_delay: the first step with quantized activations.
    weight_delay: the first step with quantized weights.
    placed: as in `make_search_step`.

  Returns:
    `(state, batch) -> (state, metrics)`; the state is donated.
  """

  def train_step(state, batch):
    bound = space.bind(
      jnp.zeros(0, jnp.int32),
      state.step >= activation_delay,
      state.step >= weight_delay,
    )
    formats = nest(space.layers, bound)
    key = jax.random.fold_in(state.key, state.step)
    keys = jax.random.split(key, jax.tree.leaves(batch)[0].shape[0])

    def one_sample(shared, batch, key):
      state, formats = shared
      gradients, stats, metrics = _gradients(state, task, formats, batch, key)
      return (gradients, stats), metrics

    (gradients, stats), metrics = _mean_over_samples(
      one_sample, mesh, (state, formats), batch, keys
    )
    return _apply(state, gradients, stats), {
      **jax.tree.map(jnp.mean, metrics),
      'gradient_norm': optax.tree.norm(gradients),
    }

  return _jit_step(train_step, mesh, placed)


def skip_unsound(
  step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]],
  mesh: Mesh,
  placed: Any = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
  """Returns a step that leaves the state as it is where its numbers are not finite.

  Only the counts of steps go on. The metrics get `skipped_in_a_row`, int32[].

  Args:
    step: from `make_search_step` or `make_train_step`.
    mesh: from `sharding.make_mesh`.
    placed: as in `make_search_step`.
  """

  def guarded(state, batch):
    new_state, metrics = step(state, batch)
    checked = jnp.stack(list(health.checked_metrics(metrics).values()))
    sound = jnp.all(jnp.isfinite(checked))
    kept = state.replace(step=new_state.step, skipped=state.skipped + 1)
    taken = new_state.replace(skipped=jnp.zeros_like(state.skipped))
    state = jax.tree.map(lambda new, old: jnp.where(sound, new, old), taken, kept)
    return state, {**metrics, 'skipped_in_a_row': state.skipped}

  return _jit_step(guarded, mesh, placed)


def make_statistics_step(
  task: Task, space: SearchSpace, mesh: Mesh
) -> Callable[[TrainState, jax.Array, Batch, Any], Any]:
  """Returns the jitted step that updates batch norm's statistics by one batch.

  The moving averages of a search are over many assignments; the final one takes its
  own, the mean over some batches of what `moving_averages` reads from this.

  Returns:
    `(state, choices int32[N], batch, old) -> new`, where `old` stands in place of
    the state's `batch_stats`, over the batch's S · B examples.
  """

  def statistics_step(state, choices, batch, old):
    batch = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), batch)
    formats = nest(space.layers, space.bind(choices))
    state = state.replace(batch_stats=old)
    _, _, stats = _forward(state, task, state.params, formats, batch, state.key)
    return stats[BATCH_STATS]

  return jax.jit(
    statistics_step,
    in_shardings=(
      _as_it_lies(mesh), replicated(mesh), batch_sharding(mesh), replicated(mesh),
    ),
    out_shardings=replicated(mesh),
  )  # fmt: skip


def make_eval_step(
  task: Task, space: SearchSpace, mesh: Mesh
) -> Callable[[TrainState, jax.Array, Batch], Metrics]:
  """Returns the jitted step that evaluates one batch `[B, ...]` under given choices.

  Returns:
    `(state, choices int32[N], batch) -> sums`: of `task.evaluation` over the
    examples that `task.mask` lets count, and `num_examples`.

  Raises:
    ConfigError: in the first call, where a value has no shape that can be summed.
  """

  def eval_step(state, choices, batch):
    formats = nest(space.layers, space.bind(choices))
    variables = {'params': state.params, FORMATS: formats, **state.model_stats}
    arguments = task.arguments(batch, False)
    outputs = state.apply_fn(variables, *arguments.args, **arguments.kwargs)
    return evaluation_sums(task, outputs, batch)

  return jax.jit(
    eval_step,
    in_shardings=(_as_it_lies(mesh), replicated(mesh), None),
    out_shardings=replicated(mesh),
  )


def evaluation_sums(task: Task, outputs: Any, batch: Batch) -> Metrics:
  """Returns sums of `task.evaluation` over the examples that count, `num_examples`.

  Args:
    task: what the outputs are worth.
    outputs: of the network.
    batch: `[B, ...]`, those that gave the outputs.

  Raises:
    ConfigError: where a value has no shape that can be summed.
  """
  size = jax.tree.leaves(batch)[0].shape[0]
  mask = task.mask and task.mask(batch)
  sums = {
    name: _sum_over_examples(name, values, mask, size)
    for name, values in task.evaluation(outputs, batch).items()
  }
  counted = jnp.int32(size) if mask is None else jnp.sum(mask)
  return {**sums, 'num_examples': counted}


def _sum_over_examples(name, values, mask, size):
  values = jnp.asarray(values)  # which a user's function may give as a number
  if problem := score_problem(name, values.shape, size, mean=mask is None):
    raise ConfigError(problem)
  if values.ndim == 0:
    return values * size
  values = jnp.mean(values.reshape(size, -1).astype(jnp.float32), axis=1)
  return jnp.sum(values if mask is None else jnp.where(mask, values, 0.0))


def _jit_step(step, mesh, placed):
  placed = replicated(mesh) if placed is None else placed
  return jax.jit(
    step,
    in_shardings=(placed, batch_sharding(mesh)),
    out_shardings=(placed, replicated(mesh)),
    donate_argnums=0,
  )


def _as_it_lies(mesh):
  """Returns the sharding of a state whose leaves may be fewer than in training."""
  return replicated(mesh) if mesh.shape['fsdp'] == 1 else None
