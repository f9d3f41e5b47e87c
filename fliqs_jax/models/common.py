"""Parts that several families of networks share."""

from collections.abc import Iterable, Mapping
from typing import Any

from flax import linen as nn

ModuleDef = Any  # a module class or a partial of one

# Keeps the variance of gradients over depth (He et al., 2015, arXiv 1502.01852).
fan_out_normal = nn.initializers.variance_scaling(2.0, 'fan_out', 'normal')

# Options of searched widths, as multiples of the published one.
WIDTH_MULTIPLIERS = (0.5, 0.625, 0.75, 1.0, 1.25, 1.5, 2.0)


def make_divisible(channels: float) -> int:
  """Rounds to the nearest multiple of 8, but down by no more than a tenth."""
  rounded = max(8, int(channels + 4) // 8 * 8)
  return rounded if rounded >= 0.9 * channels else rounded + 8


def config_problems(
  config: Mapping[str, Any], fixed: Mapping[str, Any], needed: Iterable[str]
) -> list[str]:
  """Returns what keeps a checkpoint's `config.json` from being a network's, in lines.

  Args:
    config: its content.
    fixed: the values that fields must have where they are given.
    needed: fields that must be given.
  """
  differing = [
    f'{name} is {config[name]!r}, expected {value!r}'
    for name, value in fixed.items()
    if config.get(name, value) != value
  ]
  return differing + [f'{name} is missing' for name in needed if name not in config]
