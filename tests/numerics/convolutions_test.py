"""Transposes of convolutions: JAX's own, and as XLA's CPU compiler has kernels for."""

import functools
import re

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import pytest

from fliqs_jax.numerics.convolutions import Convolution, transpose

CASES = {
  'same': {'padding': 'SAME'},
  'strides': {'window_strides': (2, 1), 'padding': ((0, 1), (2, 0))},
  'kernel dilation': {'padding': 'VALID', 'rhs_dilation': (2, 1)},
  'input dilation': {'padding': ((1, 1), (0, 2)), 'lhs_dilation': (1, 3)},
  'groups': {'padding': 'SAME', 'feature_group_count': 2},
  'depthwise': {'padding': 'SAME', 'feature_group_count': 4},
}
LAYOUTS = [('NHWC', 'HWIO', 'NHWC'), ('NCHW', 'OIHW', 'NCHW'), ('CWNH', 'WOIH', 'HNCW')]
EXTENTS = {'N': 3, 'H': 7, 'W': 6, 'C': 4, 'O': 8}


def random(layout, extents, seed):
  shape = [extents[axis] for axis in layout]
  return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize('layouts', LAYOUTS, ids='-'.join)
@pytest.mark.parametrize('arguments', CASES.values(), ids=CASES)
def test_transposes_are_those_of_jax(arguments, layouts):
  x = random(layouts[0], EXTENTS, 0)
  kernel = {'H': 3, 'W': 2, 'I': 4 // arguments.get('feature_group_count', 1), 'O': 8}
  w = random(layouts[1], kernel, 1)
  numbers = lax.conv_dimension_numbers(x.shape, w.shape, layouts)
  arguments = {'window_strides': (1, 1), **arguments}
  convolution = Convolution(dimension_numbers=numbers, **arguments)

  @jax.jit
  def both(x, w):
    y, transposes = jax.vjp(convolution, x, w)
    y_bar = jnp.cos(y)
    return transposes(y_bar), [transpose(convolution, (x, w), i, y_bar) for i in (0, 1)]

  for expected, found in zip(*both(x, w), strict=True):
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('rank', [1, 3])
def test_any_number_of_spatial_axes(rank):
  x = jax.random.normal(jax.random.key(0), (2, *[5] * rank, 3))
  w = jax.random.normal(jax.random.key(1), (*[3] * rank, 3, 4))
  space = 'HWD'[:rank]
  layouts = f'N{space}C', f'{space}IO', f'N{space}C'
  numbers = lax.conv_dimension_numbers(x.shape, w.shape, layouts)
  convolution = Convolution(
    dimension_numbers=numbers, window_strides=(1,) * rank, padding='SAME'
  )
  y, transposes = jax.vjp(convolution, x, w)
  for index, expected in enumerate(transposes(y)):
    found = transpose(convolution, (x, w), index, y)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_all_have_their_features_last_in_a_scan():
  """XLA brings none to that layout within a loop, and has slow code for the others."""
  numbers = lax.conv_dimension_numbers((1, 8, 8, 4), (3, 3, 4, 4), LAYOUTS[0])
  convolution = Convolution(
    dimension_numbers=numbers, window_strides=(1, 1), padding='SAME'
  )

  def gradients(w, y_bar, x):
    x_bar, w_bar = (transpose(convolution, (x, w), i, y_bar) for i in (0, 1))
    return w + w_bar, jnp.sum(x_bar)

  x = jnp.ones((2, 8, 8, 8, 4))
  body = lambda w, x: gradients(w, jnp.cos(x), x)
  scan = jax.jit(functools.partial(lax.scan, body))
  text = scan.lower(jnp.ones((3, 3, 4, 4)), x).compile().as_text()
  layouts = re.findall(r' convolution\(.*dim_labels=(\S+?),?(?:\s|$)', text)
  assert set(layouts) == {'b01f_01io->b01f'} and len(layouts) == 2
