"""Rewards: how quality and cost become the one number that the controller maximises.

Every reward is a pure function `(quality, cost, target, beta) -> reward` of arrays that
broadcast. The sign of `beta` is as in the source: positive where a cost is subtracted,
negative where it is an exponent.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


def absolute(quality, cost, target, beta):
  """`Q − β·|C/C_target − 1|` (TuNAS, Bender et al., 2020, Eq. 3), β > 0.

  Drives the cost to the target from both sides.
  """
  return quality - beta * jnp.abs(cost / target - 1)


def one_sided_absolute(quality, cost, target, beta):
  """`Q − β·(max(1, C/C_target) − 1)`, β > 0: nothing is gained below the target."""
  return quality - beta * (jnp.maximum(1, cost / target) - 1)


def soft_exponential(quality, cost, target, beta):
  """`Q·(C/C_target)^β` (MnasNet, Tan et al., 2019, Eq. 2), β < 0, Q ≥ 0."""
  return quality * (cost / target) ** beta


def hard_exponential(quality, cost, target, beta):
  """`Q·max(1, C/C_target)^β` (MnasNet, Eq. 3), β < 0, Q ≥ 0."""
  return quality * jnp.maximum(1, cost / target) ** beta


class Reward(NamedTuple):
  """A reward and what it takes."""

  function: Callable[[jax.Array, jax.Array, float, float], jax.Array]
  beta_sign: int  # of a β that penalises cost
  signed_quality: bool  # whether the quality may be negative, as minus the loss is


REWARDS = {
  'absolute': Reward(absolute, +1, True),
  'one_sided_absolute': Reward(one_sided_absolute, +1, True),
  'soft_exponential': Reward(soft_exponential, -1, False),
  'hard_exponential': Reward(hard_exponential, -1, False),
}
