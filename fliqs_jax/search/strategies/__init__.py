"""Strategies: how the formats are found, each a controller in a file of its own.

actor_critic     the default: exact policy gradient with an additive critic
policy_gradient  REINFORCE, as FLIQS has it: the weights train under sampled formats
sensitivity      each option measured alone, then an integer program
random           the best of eight random assignments, by the shared weights
exhaustive       the best of all assignments, for small spaces
uniform          the widest uniform model within the budget

A strategy is registered in `STRATEGIES` under the name that `search.strategy` takes.
"""

from collections.abc import Callable
from typing import NamedTuple

from fliqs_jax.search.controller import Controller
from fliqs_jax.search.strategies.actor_critic import actor_critic
from fliqs_jax.search.strategies.candidates import exhaustive, random
from fliqs_jax.search.strategies.problem import Problem
from fliqs_jax.search.strategies.sensitivity import sensitivity
from fliqs_jax.search.strategies.uniform import uniform


class Strategy(NamedTuple):
  """A way to search, and when its phases begin, as fractions of a run.

  Before `quantized_from`, and until the commitment where a strategy measures, the
  weights train unquantized.
  """

  build: Callable[[Problem], Controller] | None  # None for `policy_gradient`
  policy_delay: float
  commit_step: float
  weight_delay: float
  activation_delay: float
  searches_architectures: bool = False
  # Whether what is measured serves several targets at once.
  serves_targets: bool = False


def _measuring(build, serves_targets=False):
  """A strategy that measures, and then has two thirds of the run to finish."""
  return Strategy(build, 0.25, 0.35, 0.35, 0.35, serves_targets=serves_targets)


STRATEGIES: dict[str, Strategy] = {
  'actor_critic': _measuring(actor_critic, serves_targets=True),
  'policy_gradient': Strategy(None, 0.25, 0.9, 0.0, 0.1, searches_architectures=True),
  'sensitivity': _measuring(sensitivity, serves_targets=True),
  'random': _measuring(random),
  'exhaustive': _measuring(exhaustive),
  'uniform': Strategy(uniform, 0.0, 0.0, 0.35, 0.35),
}
# Fixed formats train as those that were searched: what is compared differs in formats.
FIXED_FORMATS = STRATEGIES['uniform']
DEFAULT = 'actor_critic'


def default_strategy(searches_architecture: bool) -> str:
  """Returns the strategy of a config that names none."""
  return 'policy_gradient' if searches_architecture else DEFAULT
