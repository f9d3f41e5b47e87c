"""Errors of rounding a tensor: clipping thresholds, and switching between formats.

Errors are mean squares over the mean square of the tensor itself, so that 1 is the
error of rounding all of it to zero. Channels are along the last axis, each with a
threshold of its own, as weights have.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from scipy import special

from fliqs_jax.numerics.calibration import calibrate, calibrate_blocks
from fliqs_jax.numerics.formats import get_format
from fliqs_jax.numerics.rounding import round_to_format


def switching_errors(
  tensors: Sequence[jax.Array], names: Sequence[str], calibration: str = 'rms'
) -> np.ndarray:
  """Returns what switching from one format to another changes, float64[F, F].

      E_ij = Σ ‖Q_i(w) − Q_j(w)‖² / Σ ‖w‖²

  A supernet whose layer is sampled in format i and then in j sees this error in its
  weights: the noise that switching formats adds to the search (FLIQS, Section 3).
  It is symmetric, and 0 from a format to itself.

  Args:
    tensors: weights, whose last axis is that of output channels.
    names: of the F formats.
    calibration: one of `calibration.CALIBRATIONS`.
  """
  errors, power = np.zeros((len(names), len(names))), 0.0
  for tensor in tensors:
    channels = _channels(tensor)
    rounded = [_quantize(channels, name, calibration) for name in names]
    power += float(np.sum(np.square(np.asarray(channels, np.float64))))
    for i, one in enumerate(rounded):
      for j, other in enumerate(rounded[:i]):
        errors[i, j] += np.sum(np.square(one - other))
        errors[j, i] = errors[i, j]
  return errors / power


def _quantize(channels, name, calibration):
  format = get_format(name)
  statistics = (
    jnp.mean(jnp.square(channels), axis=0, keepdims=True),
    jnp.max(jnp.abs(channels), axis=0, keepdims=True),
  )
  if format.blocks is None:
    quantizer = calibrate(format, *statistics, calibration)
  else:
    quantizer = calibrate_blocks(channels, format, *statistics, calibration, axis=0)
  return np.asarray(quantizer.values(channels), np.float64)


def clipping_errors(
  tensors: Sequence[jax.Array], name: str, thresholds: np.ndarray
) -> np.ndarray:
  """Returns the error of rounding at each clipping threshold, float64[T].

  Args:
    tensors: weights, whose last axis is that of output channels.
    name: of a format that is scaled.
    thresholds: float[T], in units of each channel's rms.
  """
  format = get_format(name)
  power, errors = 0.0, np.zeros(len(thresholds))
  for tensor in tensors:
    channels = _channels(tensor)
    power += float(jnp.sum(jnp.square(channels)))
    errors += np.asarray(_squared_errors(channels, format, jnp.asarray(thresholds)))
  return errors / power


def best_threshold(errors: np.ndarray) -> int:
  """Returns the index of the first minimum that is within 1 in 1,000 of the least.

  Wide floats have a ladder of minima, an octave apart, that agree to 1e-4 and less; the
  smallest threshold of them leaves the most room below.
  """
  padded = np.concatenate([[np.inf], errors, [np.inf]])
  minimum = (errors <= padded[:-2]) & (errors <= padded[2:])
  return int(np.flatnonzero(minimum & (errors <= errors.min() * 1.001))[0])


@jax.jit
def _squared_errors(channels, format, thresholds):
  rms = jnp.sqrt(jnp.mean(jnp.square(channels), axis=0))

  def squared_error(threshold):
    scale = jnp.maximum(threshold * rms, jnp.finfo(jnp.float32).tiny) / format.max
    rounded = round_to_format(channels / scale, format) * scale
    return jnp.sum(jnp.square(rounded - channels))

  return jax.lax.map(squared_error, thresholds)


def normal_errors(names: Sequence[str], calibration: str = 'rms') -> np.ndarray:
  """Returns the error of each format on standard normal data, float64[F]."""
  values = normal_values(100_000)
  # Neighbours of a sorted tensor are alike, and so would be the values of a block.
  shuffled = jnp.asarray(np.random.default_rng(0).permutation(np.asarray(values)))
  squares = []
  for name in names:
    data = values if get_format(name).blocks is None else shuffled
    error = _quantize(data, name, calibration) - np.asarray(data, np.float64)
    squares.append(np.mean(np.square(error)))
  return np.array(squares) / np.mean(np.square(values, dtype=np.float64))


def normal_values(count: int = 1_000_000) -> jax.Array:
  """Returns standard normal data without chance, its quantiles, float32[count, 1].

  A million reach to 4.9 deviations; fewer lack the tail that 8 bits clip.
  """
  quantiles = special.ndtri((np.arange(count) + 0.5) / count)
  return jnp.asarray(quantiles, jnp.float32)[:, None]


def _channels(tensor):
  tensor = jnp.asarray(tensor, jnp.float32)
  return tensor.reshape(-1, tensor.shape[-1])
