"""From a config to the objects that it names, or to all that is wrong with it."""

import functools
import math
from types import MappingProxyType
from typing import Any, NamedTuple

from flax import traverse_util
import ml_collections
import numpy as np
import optax

from fliqs_jax.layers.layer import Layer
from fliqs_jax.numerics import formats
from fliqs_jax.runs import files, networks
from fliqs_jax.search import assignments, cost_models
from fliqs_jax.search import controller as controller_lib
from fliqs_jax.search import rewards
from fliqs_jax.search import space as search_space
from fliqs_jax.training import steps
from fliqs_jax.training import task as objectives
from fliqs_jax.layers.architecture import standard
from fliqs_jax.search.assignments import Assignment
from fliqs_jax.search.budget import Budget, cost_range, fits, lowest_within
from fliqs_jax.search.budget import most_likely_within
from fliqs_jax.errors import ConfigError
from fliqs_jax.runs.config import DTYPES, validate
from fliqs_jax.runs.networks import Architecture, Network
from fliqs_jax.training.train_state import Arguments


class Setup(NamedTuple):
  """All that a run needs, but data and devices' state."""

  model: Any
  example: Arguments  # shapes of one example, in a batch of one
  standard_layers: tuple[Layer, ...]  # of the standard architecture
  architecture: Architecture  # the fixed one, empty also where it is searched
  space: search_space.SearchSpace  # without decisions where formats are fixed
  cost_model: cost_models.CostModel
  target: float  # in the cost model's unit; of no effect where formats are fixed
  caps: tuple[Budget, ...]  # other costs that the final formats keep within
  objective: objectives.Objective
  optimizer: optax.GradientTransformation
  learning_rate: optax.Schedule
  problem: steps.SearchProblem | None  # None where formats are fixed


def build(
  config: ml_collections.ConfigDict,
  num_devices: int,
  assignment: str | Assignment | None = None,
  network: Network | None = None,
  architecture: Architecture = MappingProxyType({}),
) -> Setup:
  """Returns what a resolved config names.

  Args:
    config: from `config.resolve`.
    num_devices: of all processes together.
    assignment: fixed formats, one name or those of a file, whose keys may be regexes;
      None searches what `config.search.decide` says.
    network: None takes the one that the config names.
    architecture: the fixed one, of no effect where it is searched.

  Raises:
    ConfigError: with everything that is wrong, before anything is computed.
  """
  problems = validate(config, num_devices)
  buildable = config.dtype in DTYPES and 0 < config.model.width < math.inf
  if not buildable:
    raise ConfigError(*problems)
  try:
    choose = standard
    if network is None:
      find_choose = networks.choose_searched
      if assignment is not None:
        find_choose = networks.choose_architecture
      choose = find_choose(config, architecture)
      network = networks.configured_network(config, choose)
    layers = standard_layers = network.layers
    if not choose.is_standard:
      standard_layers = networks.discover_layers(config)
    space = build_space(config, layers, assignment)
  except ValueError as error:
    # What `validate` has named may come up again here.
    new = [line for line in str(error).splitlines() if line not in problems]
    raise ConfigError(*problems, *new) from None
  if problems:
    raise ConfigError(*problems)
  try:
    cost_model = build_cost_model(config)
    target = search_target(config, standard_layers)
    caps = search_caps(config, standard_layers) if assignment is None else ()
    # A table of latencies may lack a layer or a format.
    for priced in (cost_model, *(cap.cost_model for cap in caps)):
      priced(space, np.zeros(len(space.decisions), np.int32))
  except ValueError as error:
    raise ConfigError(str(error)) from None
  learning_rate = _learning_rate(config)
  return Setup(
    model=network.model,
    example=network.example,
    standard_layers=standard_layers,
    architecture={} if choose.is_open else dict(architecture),
    space=space,
    cost_model=cost_model,
    target=target,
    caps=caps,
    objective=network.objective,
    optimizer=_optimizer(config, learning_rate),
    learning_rate=learning_rate,
    problem=None
    if assignment is not None
    else _problem(config, space, cost_model, target, caps),
  )


def build_cost_model(
  config: ml_collections.ConfigDict, name: str | None = None
) -> cost_models.CostModel:
  """Returns the cost model of that name, by default the one that is searched for.

  Raises:
    ValueError: where there is none, or its table cannot be read.
  """
  search = config.search
  name = name or search.cost_model
  settings = {'device': search.device}
  if name == 'latency_table':
    settings['table'] = files.read_latency_table(search.latency_table)
  return cost_models.get_cost_model(name, **settings)


def search_target(
  config: ml_collections.ConfigDict, layers: tuple[Layer, ...]
) -> float:
  """Returns the target in the cost model's unit.

  Args:
    config: the config.
    layers: of the standard network, a multiple of whose cost may be the target.
  """
  search = config.search
  if search.target is not None:
    return search.target
  return search.target_scale * build_cost_model(config).uniform(
    layers, search.target_format
  )


def search_caps(
  config: ml_collections.ConfigDict, layers: tuple[Layer, ...]
) -> tuple[Budget, ...]:
  """Returns the caps on other costs than the target's, in those costs' units."""
  search = config.search
  if not search.cap_cost_model:
    return ()
  cost_model = build_cost_model(config, search.cap_cost_model)
  limit = search.cap
  if limit is None:
    limit = search.cap_scale * cost_model.uniform(layers, search.cap_format)
  return (Budget(cost_model, limit),)


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
    ValueError: as `search_space.build_space` and `assignments.expand`, or where
      nothing is left to search.
  """
  if isinstance(assignment, str):
    return search_space.uniform_space(layers, assignment)
  if assignment is not None:
    return search_space.fixed_space(layers, assignments.expand(assignment, layers))
  names = formats.parse_names(config.search.formats)
  if config.search.decide == 'architecture' and len(names) > 1:
    raise ValueError(
      f'search.decide=architecture: expected one format in search.formats, found '
      f'{config.search.formats!r}'
    )
  space = search_space.build_space(
    layers,
    names,
    config.search.weights_and_activations,
    config.search.groups,
    config.search.pins,
  )
  if config.search.decide == 'architecture':
    space = space.without_format_decisions()
  if not any(len(decision.options) > 1 for decision in space.decisions):
    raise ValueError(
      'nothing to search: every layer is pinned, or search.formats names one format'
    )
  return space


# The sums of a float32 target written in decimals are given a rounding's leeway.
_LEEWAY = 1e-6


def _problem(config, space, cost_model, target, caps):
  low, high = cost_range(space, cost_model)
  if not low * (1 - _LEEWAY) <= target <= high * (1 + _LEEWAY):
    raise ConfigError(
      f'the target of {target:.6g} {cost_model.unit} cannot be reached: expected one '
      f'from {low:.6g} to {high:.6g} {cost_model.unit}, the range of search.formats='
      f'{config.search.formats!r}{_architectures(config)}; change search.target_scale, '
      'search.target_format, search.target or search.formats'
    )
  _check_caps(config, space, cost_model, target, caps)
  reward = functools.partial(
    rewards.REWARDS[config.reward.name].function,
    target=target,
    beta=config.reward.beta,
  )
  controller = config.controller
  return steps.SearchProblem(
    space=space,
    cost_model=cost_model,
    target=target,
    reward=reward,
    controller=controller_lib.policy_gradient_controller(
      space.valid,
      controller_lib.entropy_weight(
        controller.entropy_schedule,
        controller.entropy_weight,
        config.search.policy_delay,
        config.num_steps,
      ),
      controller.learning_rate,
      config.search.policy_delay,
      controller.baseline,
      controller.baseline_momentum,
    ),
    activation_delay=config.search.activation_delay,
    held_out=config.reward.split == 'validation',
  )


def _architectures(config):
  return '' if config.search.decide == 'formats' else ' and all architectures'


def _check_caps(config, space, cost_model, target, caps):
  """Raises ConfigError where no formats are within the target and the caps."""
  for cap in caps:
    name, unit = cap.cost_model.name, cap.cost_model.unit
    low, high = cost_range(space, cap.cost_model)
    if cap.limit < low * (1 - _LEEWAY):
      raise ConfigError(
        f'the cap of {cap.limit:.6g} {unit} ({name}) cannot be met: expected '
        f'{low:.6g} {unit} or more, where search.formats={config.search.formats!r} '
        f'reaches {low:.6g} to {high:.6g} {unit}; change search.cap_scale, '
        'search.cap_format, search.cap or search.formats'
      )
    budgets = Budget(cost_model, target * (1 + _LEEWAY)), cap
    lowest = lowest_within(space, cost_model, [cap])
    any_policy = np.zeros(space.valid.shape)
    likeliest = most_likely_within(
      space, cost_model, any_policy, budgets[0].limit, [cap]
    )
    if not fits(space, lowest, budgets) and not fits(space, likeliest, budgets):
      reached = float(cost_model(space, lowest))
      raise ConfigError(
        f'the target of {target:.6g} {cost_model.unit} cannot be met within the cap of '
        f'{cap.limit:.6g} {unit} ({name}), which leaves {reached:.6g} '
        f'{cost_model.unit} and more: raise one of the two'
      )


def _learning_rate(config):
  optimizer = config.optimizer
  return optax.warmup_cosine_decay_schedule(
    init_value=0.0,
    peak_value=optimizer.learning_rate,
    warmup_steps=min(optimizer.warmup_steps, config.num_steps - 1),
    decay_steps=config.num_steps,
  )


def _optimizer(config, learning_rate):
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
