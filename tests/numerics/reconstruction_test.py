"""Rounding by reconstruction, against the plain algorithm in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fliqs_jax.layers import products
from fliqs_jax.layers.moments import as_matrix, is_covered, second_moments
from fliqs_jax.numerics.calibration import calibrate
from fliqs_jax.numerics.formats import get_format
from fliqs_jax.numerics.reconstruction import (
  inverse_factor,
  reconstruct,
  thresholds,
)

FORMATS = ('int2', 'int3', 'int4', 'int8', 'e2m1', 'e4m3')


def _layer(seed, inputs=200, outputs=6):
  rng = np.random.default_rng(seed)
  mixed = rng.normal(size=(inputs, inputs)) * rng.exponential(size=(inputs, 1))
  x = rng.normal(size=(4 * inputs, inputs)) @ mixed / inputs
  x[:, 3] = 0  # of a channel that is never used
  return x.astype(np.float32), rng.normal(size=(inputs, outputs)).astype(np.float32)


def _rounded(x, w, name):
  moments = jnp.asarray(x.T @ x / len(x))
  return np.asarray(
    reconstruct(w, get_format(name), moments, inverse_factor(moments)), np.float64
  )


@jax.jit
def _values(w, format, limits):
  return calibrate(format, limits, limits, 'absmax').values(w)


def _nearest(w, name, limits):
  return np.asarray(_values(w, get_format(name), limits), np.float64)


def _plain(x, w, name):
  """The algorithm row by row, without blocks, in float64."""
  moments = (x.T @ x / len(x)).astype(np.float32)
  limits = np.asarray(thresholds(w, get_format(name), np.diagonal(moments)))
  largest = np.argmax(np.abs(w), axis=0)
  diagonal = np.diagonal(moments).astype(np.float64)
  mean = diagonal.mean()
  damped = moments + np.diag(0.01 * mean + np.where(diagonal > 0, 0, mean))
  upper = np.linalg.cholesky(np.linalg.inv(damped)).T
  w, out = w.astype(np.float64), np.zeros(w.shape)
  for i in range(len(w)):
    pinned = np.sign(w[i]) * limits[0]
    row = _nearest(np.float32(w[i])[None], name, limits)[0]
    out[i] = np.where(largest == i, pinned, row)
    error = (w[i] - out[i]) / upper[i, i]
    w[i + 1 :] -= np.outer(upper[i, i + 1 :], error)
  return out


@pytest.mark.parametrize('name', FORMATS)
@pytest.mark.parametrize('seed', range(3))
def test_it_is_the_plain_algorithm(name, seed):
  x, w = _layer(seed)
  found, expected = _rounded(x, w, name), _plain(x, w, name)
  # float32 takes a few values over a tie, and those after them with it.
  same = np.isclose(found, expected, rtol=1e-5, atol=1e-6)
  assert same.mean() > 0.97
  lost = [np.square(x @ (rounded - w)).sum() for rounded in (found, expected)]
  assert lost[0] == pytest.approx(lost[1], rel=0.02)


@pytest.mark.parametrize('name', FORMATS)
@pytest.mark.parametrize('seed', range(3))
def test_outputs_lose_less_than_by_rounding_to_nearest(name, seed):
  x, w = _layer(seed)
  importance = np.square(x).mean(0)
  limits = np.asarray(thresholds(w, get_format(name), importance))
  absmax = np.abs(w).max(0, keepdims=True)
  lost = [
    np.square(x @ (rounded - w)).sum()
    for rounded in (
      _rounded(x, w, name), _nearest(w, name, limits), _nearest(w, name, absmax),
    )
  ]  # fmt: skip
  assert lost[0] < 0.8 * lost[1]
  assert lost[1] <= 1.05 * lost[2]


@pytest.mark.parametrize('name', FORMATS)
def test_rounded_weights_are_rounded_to_themselves(name):
  for seed in range(3):
    x, w = _layer(seed)
    rounded = np.float32(_rounded(x, w, name))
    absmax = np.abs(rounded).max(0, keepdims=True)
    np.testing.assert_allclose(_nearest(rounded, name, absmax), rounded, 1e-6)


def test_formats_that_are_not_scaled_change_nothing():
  x, w = _layer(0)
  np.testing.assert_array_equal(_rounded(x, w, 'bf16'), w)


def test_one_program_serves_all_formats():
  x, w = _layer(0, inputs=20)
  reconstruct.clear_cache()
  for name in (*FORMATS, 'float32'):
    _rounded(x, w, name)
  assert reconstruct._cache_size() == 1


def test_without_inputs_weights_are_rounded_to_nearest():
  _, w = _layer(0)
  name, zeros = 'int4', np.zeros((8, len(w)), np.float32)
  absmax = np.abs(w).max(0, keepdims=True)
  np.testing.assert_allclose(_rounded(zeros, w, name), _nearest(w, name, absmax), 1e-6)


def _random(*shape):
  return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


X = _random(2, 6, 6, 3)
COVERED = {
  'dense': (
    products.dot_general, X, _random(3, 5),
    {'dimension_numbers': (((3,), (0,)), ((), ()))},
  ),
  'several axes': (
    products.dot_general, X, _random(6, 3, 5),
    {'dimension_numbers': (((2, 3), (0, 1)), ((), ()))},
  ),
  'conv': (
    products.convolution, X, _random(3, 2, 3, 5),
    {'window_strides': (2, 1), 'padding': 'SAME', 'rhs_dilation': (1, 2),
     'dimension_numbers': ('NHWC', 'HWIO', 'NHWC')},
  ),
}  # fmt: skip


@pytest.mark.parametrize('name', COVERED)
def test_moments_and_matrix_are_those_of_the_product(name):
  make, x, w, arguments = COVERED[name]
  product = make(x, w, **arguments)
  assert is_covered(product)
  y = product.function(x, w)
  matrix, restore = as_matrix(product, w)
  moments = second_moments(product, x, w)
  rows = y.size // matrix.shape[1]
  squares = jnp.einsum('nc,nm,mc->c', matrix, moments, matrix) * rows
  expected = jnp.sum(jnp.square(y.reshape(-1, matrix.shape[1])), axis=0)
  np.testing.assert_allclose(squares, expected, 1e-4)
  np.testing.assert_array_equal(restore(matrix), w)


def test_groups_are_not_covered():
  product = products.convolution(
    X, _random(3, 3, 1, 3), (1, 1), 'SAME', feature_group_count=3,
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
  )  # fmt: skip
  assert not is_covered(product)
  assert not is_covered(products.einsum(X, _random(3, 5), 'abcd,de->abce'))
