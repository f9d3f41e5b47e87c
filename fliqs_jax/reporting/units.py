"""Costs in the multiple of their unit that reads well: 4.449 MBOPs, not 0.004449 GBOPs.

Files and targets keep the cost model's unit; what a person reads has a multiple of it.
"""

from collections.abc import Iterable
import decimal
import math
from typing import NamedTuple

# Multiples of a cost model's unit, from large to small, and what power of ten they are
# of it. A unit that is not here stays as it is.
_MULTIPLES = {
  'GBOPs': {'TBOPs': 3, 'GBOPs': 0, 'MBOPs': -3, 'kBOPs': -6, 'BOPs': -9},
  'Gbit·MACs': {
    'Tbit·MACs': 3, 'Gbit·MACs': 0, 'Mbit·MACs': -3, 'kbit·MACs': -6, 'bit·MACs': -9
  },
  'bytes': {'TB': 12, 'GB': 9, 'MB': 6, 'kB': 3, 'bytes': 0},
  'ms': {'s': 3, 'ms': 0, 'µs': -3, 'ns': -6},
}  # fmt: skip


class Unit(NamedTuple):
  """A multiple of a cost model's unit."""

  name: str
  power: int  # of ten, that it is of the cost model's unit

  def scale(self, cost: float) -> float:
    """Returns a cost, given in the cost model's unit, in this one; digits stay."""
    if not math.isfinite(cost):
      return cost
    return float(decimal.Decimal(repr(float(cost))).scaleb(-self.power))

  def text(self, cost: float) -> str:
    """Returns a cost, given in the cost model's unit, at six digits with this one."""
    return f'{self.scale(cost):.6g} {self.name}'


def choose(costs: Iterable[float], unit: str) -> Unit:
  """Returns the multiple in which the largest of some costs is at least 1.

  Args:
    costs: in the cost model's unit, of which one multiple is to serve all.
    unit: the cost model's.
  """
  multiples = _MULTIPLES.get(unit, {unit: 0})
  largest = max((abs(cost) for cost in costs if math.isfinite(cost)), default=0)
  if not largest:
    return Unit(unit, 0)
  for name, power in multiples.items():
    # At six digits, which may round up to the next multiple.
    if float(f'{largest:.6g}') >= 10.0**power:
      return Unit(name, power)
  return Unit(name, power)
