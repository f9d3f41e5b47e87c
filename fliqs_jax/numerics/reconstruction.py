"""Rounding by reconstruction: what a layer computes is kept, not its weights.

    min ‖X w − X q‖²,  H = XᵀX

Rows of `w`, each an input of the layer, are rounded in turn, and what one loses is made
up for by those that are not rounded yet (GPTQ, Frantar et al., 2022, arXiv 2210.17323,
Algorithm 1): with `U` the upper Cholesky factor of `H⁻¹`,

    q_i = round(w_i),   w_j ← w_j − U_ij (w_i − q_i) / U_ii   for j > i.

The largest magnitude of each output channel keeps the largest code of the format, so
that its scale is found again from the rounded weights alone, by the calibration
`absmax`. Formats are data: one compiled function serves all of them.
"""

import functools

import jax
from jax import lax
import jax.numpy as jnp

from fliqs_jax.numerics.calibration import calibrate
from fliqs_jax.numerics.formats import NumericFormat
from fliqs_jax.numerics.rounding import is_scaled

_DAMPING = 0.01  # of the mean of H's diagonal, added to it, as in the paper
_BLOCK = 128  # rows, after which those that follow are updated at once
# Clipping thresholds that are tried, relative to the largest magnitude of a channel.
_RATIOS = tuple(i / 20 for i in range(20, 3, -1))  # 1 … 0.2


def inverse_factor(moments: jax.Array) -> jax.Array:
  """Returns `U`, upper triangular with `UᵀU = H⁻¹`, float32[n, n].

  Args:
    moments: `H`, float32[n, n], the damped second moments of the n inputs of a layer.
      An input that is always 0 gets the mean of the others.
  """
  diagonal = jnp.diagonal(moments)
  damped = moments + jnp.diag(
    _DAMPING * jnp.mean(diagonal) + jnp.where(diagonal > 0, 0.0, jnp.mean(diagonal))
  )
  # Of zeros alone, all that is lost counts the same.
  damped = jnp.where(jnp.any(diagonal > 0), damped, jnp.eye(len(moments)))
  lower = jnp.linalg.cholesky(damped)
  half = jax.scipy.linalg.solve_triangular(lower, jnp.eye(len(moments)), lower=True)
  return jnp.linalg.cholesky(half.T @ half).T


def thresholds(w: jax.Array, format: NumericFormat, importance: jax.Array) -> jax.Array:
  """Returns the clipping threshold of each output channel, float32[1, c].

  It is that of a few which loses least when weights are rounded to nearest.

  Args:
    w: float32[n, c].
    format: a scalar format without blocks.
    importance: float32[n], the mean square of each input.
  """
  absmax = jnp.max(jnp.abs(w), axis=0, keepdims=True)

  def error(ratio):
    lost = calibrate(format, absmax, ratio * absmax, 'absmax').values(w) - w
    return jnp.sum(importance[:, None] * jnp.square(lost), axis=0)

  ratios = jnp.array(_RATIOS)
  best = jnp.argmin(lax.map(error, ratios), axis=0)
  return absmax * ratios[best]


@jax.jit
def reconstruct(
  w: jax.Array, format: NumericFormat, moments: jax.Array, factor: jax.Array
) -> jax.Array:
  """Returns the rounded weights, float32[n, c], values of the format by their channel.

  Weights of a format that is not scaled stay as they are.

  Args:
    w: float32[n, c], of n inputs and c output channels.
    format: a scalar format without blocks.
    moments: `H`, float32[n, n].
    factor: `inverse_factor(moments)`.
  """
  limits = thresholds(w, format, jnp.diagonal(moments))
  quantizer = calibrate(format, limits, limits, 'absmax')
  is_largest = jnp.arange(len(w))[:, None] == jnp.argmax(jnp.abs(w), axis=0)
  pinned = jnp.where(is_largest, jnp.sign(w) * limits, 0.0)
  missing = -len(w) % _BLOCK
  pad = lambda a: jnp.pad(a, ((0, missing), (0, 0)))
  padded = jnp.pad(factor, ((0, missing), (0, missing)))
  padded += jnp.diag(jnp.where(jnp.arange(len(padded)) < len(w), 0.0, 1.0))
  update = functools.partial(_round_block, quantizer, padded, pad(pinned))
  count = (len(w) + missing) // _BLOCK
  rounded = lax.fori_loop(0, count, update, pad(w))[: len(w)]
  return jnp.where(is_scaled(format), rounded, w)


def _round_block(quantizer, factor, pinned, block, w):
  """Rounds the rows of a block, and makes up for what they lose in those after it."""
  start = block * _BLOCK
  rows = lax.dynamic_slice_in_dim(w, start, _BLOCK)
  fixed = lax.dynamic_slice_in_dim(pinned, start, _BLOCK)
  right = lax.dynamic_slice_in_dim(factor, start, _BLOCK)
  own = lax.dynamic_slice_in_dim(right, start, _BLOCK, axis=1)

  def round_row(i, carry):
    rows, errors = carry
    row, pin = rows[i][None], fixed[i][None]
    rounded = jnp.where(pin != 0, pin, quantizer.values(row))
    error = (row - rounded) / own[i, i]
    after = jnp.where(jnp.arange(_BLOCK) > i, own[i], 0.0)
    rows = (rows - after[:, None] * error).at[i].set(rounded[0])
    return rows, errors.at[i].set(error[0])

  rows, errors = lax.fori_loop(0, _BLOCK, round_row, (rows, jnp.zeros_like(rows)))
  later = jnp.arange(len(w)) >= start + _BLOCK
  w = w - jnp.where(later[:, None], right.T @ errors, 0.0)
  return lax.dynamic_update_slice_in_dim(w, rows, start, axis=0)
