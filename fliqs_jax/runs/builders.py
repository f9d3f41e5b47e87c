"""Builders of what a config names: space, costs, controller and optimizer."""

import functools
import math

from flax import traverse_util
import ml_collections
import numpy as np
import optax

from fliqs_jax.errors import ConfigError
from fliqs_jax.layers.layer import Layer
from fliqs_jax.runs import files
from fliqs_jax.search import assignments, cost_models, devices, options, rewards
from fliqs_jax.search import controller as controller_lib
from fliqs_jax.search import space as search_space
from fliqs_jax.search.assignments import Assignment
from fliqs_jax.search.budget import (
  Budget,
  cost_range,
  fits,
  lowest_within,
  most_likely_within,
)
from fliqs_jax.search.strategies import STRATEGIES
from fliqs_jax.search.strategies.problem import Problem

# The sums of a float32 target written in decimals are given a rounding's leeway.
_LEEWAY = 1e-6


def build_cost_model(
  config: ml_collections.ConfigDict, name: str | None = None
) -> cost_models.CostModel:
  """Returns the cost model of that name, by default the one that is searched for.

  Raises:
    ConfigError: where there is none, or its table cannot be read.
  """
  search = config.search
  name = name or search.cost_model
  settings = {'device': search.device or devices.DEFAULT}
  if name == 'latency_table':
    settings['table'] = files.read_latency_table(search.latency_table)
  return cost_models.get_cost_model(name, **settings)


def search_caps(
  config: ml_collections.ConfigDict,
  cost_model: cost_models.CostModel,
  layers: tuple[Layer, ...],
) -> tuple[Budget, ...]:
  """Returns the caps on other costs than the target's, in those costs' units.

  Args:
    config: the config.
    cost_model: that of the target.
    layers: of the standard network, a multiple of whose cost may be the cap.
  """
  search = config.search
  if not search.cap_cost_model:
    return ()
  capped = cost_model
  if search.cap_cost_model != cost_model.name:
    capped = build_cost_model(config, search.cap_cost_model)
  limit = search.cap
  if limit is None:
    limit = search.cap_scale * capped.uniform(layers, search.cap_format)
  return (Budget(capped, limit),)


def build_space(
  config: ml_collections.ConfigDict,
  layers: tuple[Layer, ...],
  assignment: str | Assignment | None = None,
) -> search_space.SearchSpace:
  """Returns the space of fixed formats, or the one that `config.search` describes.

  Args:
    config: the config.
    layers: from `discover_layers`.
    assignment: the fixed formats; None searches them.

  Raises:
    ConfigError: as `search_space.build_space`, `search_space.check_blocks` and
      `assignments.expand`, or where nothing is left to search.
  """
  space = _build_space(config, layers, assignment)
  search_space.check_blocks(space)
  return space


def _build_space(config, layers, assignment):
  if isinstance(assignment, str):
    return search_space.uniform_space(layers, assignment)
  if assignment is not None:
    return search_space.fixed_space(layers, assignments.expand(assignment, layers))
  found = options.parse(config.search.formats)
  if config.search.decide == 'architecture' and len(found) > 1:
    raise ConfigError(
      f'search.decide=architecture: expected one format in search.formats, found '
      f'{config.search.formats!r}'
    )
  space = search_space.build_space(
    layers,
    found,
    config.search.weights_and_activations,
    config.search.groups,
    config.search.pins,
  )
  if config.search.decide == 'architecture':
    space = space.without_format_decisions()
  if not any(len(decision.options) > 1 for decision in space.decisions):
    raise ConfigError(
      'nothing to search: every layer is pinned, or search.formats names one format'
    )
  return space


def check_reachable(
  config: ml_collections.ConfigDict,
  space: search_space.SearchSpace,
  budget: Budget,
  caps: tuple[Budget, ...],
) -> None:
  """Checks that a space has choices within the target and the caps.

  Args:
    config: the config.
    space: the search space.
    budget: the target.
    caps: from `search_caps`.

  Raises:
    ConfigError: where it has none; the message states the range.
  """
  (cost_model, target), unit = budget, budget.cost_model.unit
  low, high = cost_range(space, cost_model)
  if not low * (1 - _LEEWAY) <= target <= high * (1 + _LEEWAY):
    raise ConfigError(
      f'the target of {target:.6g} {unit} cannot be reached: expected one '
      f'from {low:.6g} to {high:.6g} {unit}, the range of search.formats='
      f'{config.search.formats!r}{_architectures(config)}; change '
      f'{_reachable_scales(config, target, low, high)}'
      'search.target_format, search.target or search.formats'
    )
  for cap in caps:
    _check_cap(config, space, budget, cap)


def _reachable_scales(config, target, low, high):
  """Returns the field of the scale with what it may be; none where it has no effect."""
  search = config.search
  if search.target is not None:
    return ''
  uniform = target / search.target_scale
  # Rounded inwards, so that both ends can be reached.
  least, most = math.ceil(1e4 * low / uniform), math.floor(1e4 * high / uniform)
  return (
    f'search.target_scale to one from {least / 1e4:g} to {most / 1e4:g} (with '
    f'search.target_format={search.target_format}), or '
  )


def _architectures(config):
  return '' if config.search.decide == 'formats' else ' and all architectures'


def _check_cap(config, space, budget, cap):
  name, unit = cap.cost_model.name, cap.cost_model.unit
  low, high = cost_range(space, cap.cost_model)
  if cap.limit < low * (1 - _LEEWAY):
    raise ConfigError(
      f'the cap of {cap.limit:.6g} {unit} ({name}) cannot be met: expected '
      f'{low:.6g} {unit} or more, where search.formats={config.search.formats!r} '
      f'reaches {low:.6g} to {high:.6g} {unit}; change search.cap_scale, '
      'search.cap_format, search.cap or search.formats'
    )
  cost_model, target = budget
  budgets = Budget(cost_model, target * (1 + _LEEWAY)), cap
  lowest = lowest_within(space, cost_model, [cap])
  any_policy = np.zeros(space.valid.shape)
  likeliest = most_likely_within(space, cost_model, any_policy, budgets[0].limit, [cap])
  if not fits(space, lowest, budgets) and not fits(space, likeliest, budgets):
    reached = float(cost_model(space, lowest))
    raise ConfigError(
      f'the target of {target:.6g} {cost_model.unit} cannot be met within the cap of '
      f'{cap.limit:.6g} {unit} ({name}), which leaves {reached:.6g} '
      f'{cost_model.unit} and more: raise one of the two'
    )


def build_problem(
  config: ml_collections.ConfigDict,
  space: search_space.SearchSpace,
  target: Budget,
  caps: tuple[Budget, ...],
  shared_limits: tuple[float, ...] = (),
) -> Problem:
  """Returns the record of what a config's strategy searches."""
  return Problem(
    space=space,
    target=target,
    caps=caps,
    num_samples=config.search.num_samples,
    policy_delay=config.search.policy_delay,
    commit_step=config.search.commit_step,
    seed=config.seed,
    entropy_schedule=config.controller.entropy_schedule,
    shared_limits=shared_limits,
  )


def build_controller(
  config: ml_collections.ConfigDict, problem: Problem
) -> controller_lib.Controller:
  """Returns the controller that a config describes.

  Raises:
    ConfigError: where the strategy cannot search the problem.
  """
  build = STRATEGIES[config.search.strategy].build
  if build is not None:
    return build(problem)
  settings = config.controller
  reward = rewards.REWARDS[config.reward.name].function
  return controller_lib.policy_gradient_controller(
    problem.space.valid,
    functools.partial(reward, target=1.0, beta=config.reward.beta),
    controller_lib.entropy_weight(
      settings.entropy_schedule,
      settings.entropy_weight,
      config.search.policy_delay,
      config.num_steps,
    ),
    settings.learning_rate,
    config.search.policy_delay,
    settings.baseline,
    settings.baseline_momentum,
    problem.target.limit,
  )


def build_learning_rate(config: ml_collections.ConfigDict) -> optax.Schedule:
  """Returns the cosine schedule with a warm-up."""
  optimizer, num_steps = config.optimizer, max(config.num_steps, 1)
  return optax.warmup_cosine_decay_schedule(
    init_value=0.0,
    peak_value=optimizer.learning_rate,
    warmup_steps=min(optimizer.warmup_steps, num_steps - 1),
    decay_steps=num_steps,
  )


def build_optimizer(
  config: ml_collections.ConfigDict, learning_rate: optax.Schedule
) -> optax.GradientTransformation:
  """Returns the optimizer of the weights, which decays kernels alone."""

  def is_kernel(params):
    return traverse_util.path_aware_map(lambda path, _: path[-1] == 'kernel', params)

  settings = config.optimizer
  if settings.name == 'adamw':
    return optax.adamw(
      learning_rate,
      b1=settings.momentum,
      b2=settings.square_decay,
      eps=settings.epsilon,
      weight_decay=settings.weight_decay,
      mask=is_kernel,
    )
  if settings.name == 'rmsprop':
    rule = optax.rmsprop(
      learning_rate,
      decay=settings.square_decay,
      eps=settings.epsilon,
      initial_scale=1.0,  # as in TensorFlow, for which the recipes are tuned
      momentum=settings.momentum,
    )
  else:
    rule = optax.sgd(learning_rate, momentum=settings.momentum)
  return optax.chain(
    optax.add_decayed_weights(settings.weight_decay, mask=is_kernel), rule
  )
