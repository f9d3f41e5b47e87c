"""Computes the MSE-optimal clipping threshold of every scaled format.

    python benchmarks/clipping_thresholds.py

prints the table that `fliqs_jax/numerics/formats.py` carries as constants. The data is
standard normal; the error of each threshold is integrated in closed form, cell by cell.
"""

import numpy as np
from scipy import optimize, stats

from fliqs_jax.numerics import formats


def representable_values(name: str) -> np.ndarray:
  """Returns the non-negative values of a format, ascending, as float64."""
  f = formats.find_format(name)
  if f.family == 'int':
    return np.arange(f.largest + 1)
  m = f.mantissa_bits
  subnormal = np.arange(2**m) * 2.0 ** (f.exponent_min - m)
  normal = [
    (2**m + np.arange(2**m)) * 2.0 ** (e - m)
    for e in range(f.exponent_min, f.exponent_max + 1)
  ]
  values = np.concatenate([subnormal, *normal])
  return values[values <= f.largest]


def normal_mse(threshold: float, values: np.ndarray) -> float:
  """Mean squared error of N(0, 1) data rounded to `values`, scaled to `threshold`."""
  q = values * threshold / values[-1]
  edges = np.concatenate([[0.0], (q[1:] + q[:-1]) / 2, [np.inf]])
  probability = np.diff(stats.norm.cdf(edges))
  first_moment = -np.diff(stats.norm.pdf(edges))
  return float(1 + 2 * np.sum(q**2 * probability - 2 * q * first_moment))


def optimal_threshold(name: str) -> float:
  """Returns the smallest threshold whose error is a minimum.

  Shifting a float format by an octave hardly changes its error while its subnormals
  stay small, so wide floats have a ladder of minima that agree to 1e-4 and less. The
  smallest of them leaves the most room below.
  """
  values = representable_values(name)
  grid = np.geomspace(0.5, 64.0, 500)
  error = np.array([normal_mse(t, values) for t in grid])
  minima = 1 + np.flatnonzero((error[1:-1] < error[:-2]) & (error[1:-1] < error[2:]))
  first = minima[error[minima] <= error[minima].min() * (1 + 1e-4)][0]
  return optimize.minimize_scalar(
      normal_mse, args=(values,), bounds=(grid[first - 1], grid[first + 1]),
      method='bounded', options={'xatol': 1e-6},
  ).x  # fmt: skip


def main():
  for name in formats.INTEGER_NAMES + formats.FLOAT_NAMES:
    print(f'    {name!r}: {optimal_threshold(name):.3f},')


if __name__ == '__main__':
  main()
