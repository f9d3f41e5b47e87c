"""The record of all that a run needs, built from a config and checked."""

from collections.abc import Callable, Iterable
from types import MappingProxyType
from typing import NamedTuple

from flax import linen as nn
import jax
import ml_collections
import numpy as np
import optax

from fliqs_jax.data.batches import BatchIterator
from fliqs_jax.errors import Problems
from fliqs_jax.layers.architecture import standard
from fliqs_jax.layers.layer import Layer
from fliqs_jax.runs import builders, targets
from fliqs_jax.runs import network as network_lib
from fliqs_jax.runs.network import Architecture, Network
from fliqs_jax.runs.validation import can_build, trains_nothing, validate
from fliqs_jax.search.assignments import Assignment
from fliqs_jax.search.budget import Budget, cost_range
from fliqs_jax.search.controller import Controller
from fliqs_jax.search.cost_models import CostModel
from fliqs_jax.search.space import SearchSpace
from fliqs_jax.search.strategies.problem import Problem
from fliqs_jax.training.task import Batch, Task
from fliqs_jax.training.train_state import Arguments, Variables


class Data(NamedTuple):
  """Sources of a run's batches, numpy arrays in dicts."""

  # (seed, sharding) -> this process's part of batches `[S, B, ...]`, in the order that
  # the seed sets. The iterator tells and takes its position. None where nothing trains.
  train: Callable[[int, jax.sharding.Sharding], BatchIterator] | None
  # (sharding) -> its part of batches `[B, ...]` that have each example once.
  evaluation: Callable[[jax.sharding.Sharding], Iterable[Batch]]
  # Whether each process yields whole batches, of which its devices take their part.
  whole: bool = False


class Setup(NamedTuple):
  """All that a run needs.

  Attributes:
    config: resolved; numbers that follow from others are fields of their own here.
    model: the network, with quantized layers.
    example: shapes of one example, in a batch of one.
    task: what the network is trained for.
    standard_layers: the layers of the standard architecture.
    architecture: the fixed one, empty also where it is searched.
    space: the search space, without decisions where formats are fixed.
    cost_model: the cost that is searched for.
    target: in the cost model's unit; of no effect where formats are fixed.
    caps: other costs that the final formats keep within.
    problem: what is searched; None where formats are fixed.
    controller: the policy; None where formats are fixed or nothing is trained.
    optimizer: of the weights.
    learning_rate: its schedule.
    num_samples: S, the samples of a step.
    commit_step: the step from which on the final formats are used; None for never.
    data: the batches; None where none are needed.
    start: variables to start from; None for random ones.
  """

  config: ml_collections.ConfigDict
  model: nn.Module
  example: Arguments
  task: Task
  standard_layers: tuple[Layer, ...]
  architecture: Architecture
  space: SearchSpace
  cost_model: CostModel
  target: float
  caps: tuple[Budget, ...]
  problem: Problem | None
  controller: Controller | None
  optimizer: optax.GradientTransformation
  learning_rate: optax.Schedule
  num_samples: int
  commit_step: int | None
  data: Data | None = None
  start: Variables | None = None


def build(
  config: ml_collections.ConfigDict,
  num_devices: int,
  assignment: str | Assignment | None = None,
  network: Network | None = None,
  architecture: Architecture = MappingProxyType({}),
) -> Setup:
  """Returns what a resolved config names, without data.

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
  problems = Problems(*validate(config, num_devices))
  if not can_build(config):
    problems.raise_any()
  found = problems.attempt(_find, config, assignment, network, architecture)
  problems.raise_any()
  network, standard_layers, architecture, space = found
  cost_model = builders.build_cost_model(config)
  target = targets.limit(config.search, cost_model, standard_layers)
  searches, caps, problem = assignment is None, (), None
  if searches:
    caps = builders.search_caps(config, cost_model, standard_layers)
  # A table of latencies may lack a layer or a format.
  for priced in (cost_model, *(cap.cost_model for cap in caps)):
    priced(space, np.zeros(len(space.decisions), np.int32))
  if searches:
    if config.search.max_quality_drop is not None:
      _, target = cost_range(space, cost_model)  # any cost will do
    budget = Budget(cost_model, target)
    problem = _build_problem(config, space, budget, caps, standard_layers)
  trains = searches and not trains_nothing(config)
  learning_rate = builders.build_learning_rate(config)
  return Setup(
    config=config,
    model=network.model,
    example=network.example,
    task=network.task,
    standard_layers=standard_layers,
    architecture=architecture,
    space=space,
    cost_model=cost_model,
    target=target,
    caps=caps,
    problem=problem,
    controller=builders.build_controller(config, problem) if trains else None,
    optimizer=builders.build_optimizer(config, learning_rate),
    learning_rate=learning_rate,
    num_samples=config.search.num_samples if searches else 1,
    commit_step=_commit_step(config) if searches else None,
  )


def _commit_step(config):
  return config.search.commit_step if config.search.hard_budget else None


def _build_problem(config, space, budget, caps, standard_layers):
  """Returns what is searched, within a budget that some choices meet."""
  builders.check_reachable(config, space, budget, caps)
  shared_limits = tuple(
    targets.limit(targets.parse(text), budget.cost_model, standard_layers)
    for text in config.search.targets
  )
  return builders.build_problem(config, space, budget, caps, shared_limits)


def _find(config, assignment, network, architecture):
  """Returns the network, the standard one's layers, the architecture, the space."""
  choose = standard
  if network is None:
    if assignment is None:
      choose = network_lib.choose_searched(config, architecture)
    else:
      choose = network_lib.choose_architecture(config, architecture)
    network = network_lib.build_network(config, choose)
  standard_layers = network.layers
  if not choose.is_standard:
    standard_layers = network_lib.discover_layers(config)
  space = builders.build_space(config, network.layers, assignment)
  fixed = {} if choose.is_open else dict(architecture)
  return network, standard_layers, fixed, space
