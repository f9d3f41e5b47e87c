"""Scales of activations for each token, against fake quantization in float64."""

import functools

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references

from fliqs_jax.layers.variables import FORMATS, nest
from fliqs_jax.linen.discovery import discover
from fliqs_jax.linen.interception import make_searchable
from fliqs_jax.search.space import fixed_space

# Constructor, input shape, the axes that a scale of the input spans, and of the kernel.
LAYERS = {
    'dense': (functools.partial(nn.Dense, 5), (3, 4, 7), (2,), (0,)),
    'inner_axis': (
        functools.partial(nn.DenseGeneral, 4, axis=1), (2, 5, 3), (1,), (0,)
    ),
    'batch_axes': (
        functools.partial(nn.DenseGeneral, (2, 4), axis=(-1,), batch_dims=(0, 1)),
        (2, 3, 4, 5), (3,), (2,),
    ),
    'conv': (
        functools.partial(nn.Conv, 3, (3, 2)), (3, 4, 4, 5), (1, 2, 3), (0, 1, 2)
    ),
    'einsum': (
        functools.partial(nn.Einsum, (6, 2, 3), 'bki,knh->binh'), (2, 6, 4), (1,), (0,)
    ),
}  # fmt: skip


def rounded(array, name, axes):
  array = array.astype(np.float64)
  mean_square = np.mean(array**2, axes, keepdims=True)
  absmax = np.abs(array).max(axes, keepdims=True)
  return references.fake_quantize(array, name, mean_square, absmax)


@pytest.mark.parametrize('kind', LAYERS)
def test_each_token_has_a_scale_of_its_own(kind):
  constructor, shape, spanned, contracted = LAYERS[kind]
  plain = constructor(use_bias=False)
  model = make_searchable(plain, activation_scale='token')
  rng = np.random.default_rng(0)
  # Tokens of very different sizes.
  kept = [1 if axis in spanned else n for axis, n in enumerate(shape)]
  x = rng.normal(size=shape) * np.exp2(rng.integers(-9, 9, kept))
  x = x.astype(np.float32)
  layers = discover(model, x)
  variables = model.init(jax.random.key(0), x)
  kernel = rng.normal(size=variables['params']['kernel'].shape).astype(np.float32)
  space = fixed_space(
    layers, {layers[0].path: {'weights': 'int6', 'activations': 'int5'}}
  )
  bound = {FORMATS: nest(layers, space.bind(jnp.zeros(0, jnp.int32)))}

  @jax.jit
  def outputs(kernel, x, cotangent):
    apply = lambda k, x: model.apply({'params': {'kernel': k}} | bound, x)  # noqa: E731
    y, pull_back = jax.vjp(apply, kernel, x)
    return y, *pull_back(cotangent)

  shape = jax.eval_shape(plain.apply, {'params': {'kernel': kernel}}, x).shape
  cotangent = rng.normal(size=shape).astype(np.float32)
  actual = outputs(kernel, x, cotangent)

  (w_values, w_inside), (x_values, x_inside) = (
    rounded(kernel, 'int6', contracted),
    rounded(x, 'int5', spanned),
  )
  with jax.enable_x64(True):
    exact = constructor(use_bias=False, param_dtype=jnp.float64)
    y, pull_back = jax.vjp(
      lambda k, x: exact.apply({'params': {'kernel': k}}, x),
      jnp.asarray(w_values),
      jnp.asarray(x_values),
    )
    w_bar, x_bar = map(np.asarray, pull_back(jnp.asarray(cotangent, jnp.float64)))
  expected = np.asarray(y), w_bar * w_inside, x_bar * x_inside
  for got, wanted in zip(actual, expected):
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-6 * np.abs(wanted).max())
