"""Layers in block formats: products, gradients, and a search over them."""

import functools

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references

from fliqs_jax.layers.variables import FORMATS, QUANT_STATS, nest
from fliqs_jax.linen.discovery import discover
from fliqs_jax.linen.interception import make_searchable
from fliqs_jax.numerics.formats import find_format
from fliqs_jax.search.space import build_space, uniform_space

# Constructor, input shape, the blocked axes of input and kernel, groups of the input.
LAYERS = {
    'dense': (functools.partial(nn.Dense, 5), (3, 2, 40), -1, 0, 1),
    'several_axes': (
        functools.partial(nn.DenseGeneral, 4, axis=(-2, -1)), (3, 2, 40), -1, 1, 1
    ),
    'conv': (functools.partial(nn.Conv, 3, (3, 2)), (2, 4, 4, 40), -1, 2, 1),
    'groups': (
        functools.partial(nn.Conv, 4, (2, 2), feature_group_count=2),
        (2, 3, 3, 80), -1, 2, 2,
    ),
    'einsum': (
        functools.partial(nn.Einsum, (40, 2, 3), 'bki,knh->binh'), (2, 40, 4), 1, 0, 1
    ),
    'conv_transpose': (
        functools.partial(nn.ConvTranspose, 3, (2, 2)), (2, 3, 3, 40), -1, 2, 1
    ),
}  # fmt: skip
NAMES = ('nvfp4', 'mxfp8_e4m3', 'int4_b32', 'bf16')


def reference(x, name, axis, groups, absmax):
  """Returns a tensor's values in float64."""
  if name == 'bf16':
    return references.cast(x, name).astype(np.float64)
  format, x = find_format(name), np.moveaxis(np.asarray(x, np.float64), axis, -1)
  largest = references.largest(format.element)
  parts = x.reshape(*x.shape[:-1], groups, -1)
  size, length = format.block.size, parts.shape[-1]
  padded = np.zeros((*parts.shape[:-1], -(-length // size) * size))
  padded[..., :length] = parts
  blocks = padded.reshape(*parts.shape[:-1], -1, size)
  block_absmax, tensor_scale = np.abs(blocks).max(axis=-1, keepdims=True), 1.0
  if name == 'nvfp4':
    tensor_scale = absmax / (448 * largest)
    scales = block_absmax / largest / tensor_scale
    scales = references.nearest_code(scales, 'e4m3')
  elif name == 'int4_b32':
    scales = np.float16(block_absmax / largest).astype(np.float64)
  else:
    scales = 2 ** (np.floor(np.log2(block_absmax)) - np.floor(np.log2(largest)))
  scales = scales * tensor_scale
  values = references.nearest_code(blocks / scales, format.element) * scales
  values = values.reshape(padded.shape)[..., :length].reshape(x.shape)
  return np.moveaxis(values, -1, axis)


@functools.cache
def case(kind):
  """Returns the plain layer, the searched one, its layers, variables and inputs."""
  constructor, shape, *_ = LAYERS[kind]
  plain = constructor()
  model = make_searchable(plain)
  rng = np.random.default_rng(0)
  x = rng.normal(size=shape).astype(np.float32)
  variables = model.init(jax.random.key(0), x)
  params = jax.tree.map(
    lambda p: rng.normal(size=p.shape).astype(np.float32), variables['params']
  )
  absmax = np.float32(np.abs(x).max())
  stats = jax.tree.map_with_path(
    lambda path, _: absmax if 'absmax' in str(path[-1]) else np.float32(np.mean(x**2)),
    variables[QUANT_STATS],
  )
  return plain, model, discover(model, x), {'params': params, QUANT_STATS: stats}, x


@pytest.mark.parametrize('kind', LAYERS)
def test_products_and_gradients_are_those_of_the_rounded_operands(kind):
  plain, model, layers, variables, x = case(kind)
  _, _, x_axis, w_axis, groups = LAYERS[kind]
  assert layers[0].contraction_length == 40
  kernel = variables['params']['kernel']
  space = build_space(layers, NAMES)

  @jax.jit
  def outputs(choices, params, x, cotangent):
    bound = nest(layers, space.bind(choices))

    def apply(params, x):
      return model.apply({**variables, 'params': params, FORMATS: bound}, x)

    y, pull_back = jax.vjp(apply, params, x)
    return y, *pull_back(cotangent(y))

  noise = np.random.default_rng(1).normal(size=10_000).astype(np.float32)
  cotangent = jax.tree_util.Partial(lambda y: noise[: y.size].reshape(y.shape))
  for choice, name in enumerate(NAMES):
    y, params_bar, x_bar = outputs(
      np.array([choice], np.int32), variables['params'], x, cotangent
    )
    rounded_x = reference(x, name, x_axis, groups, np.abs(x).max())
    rounded_w = reference(kernel, name, w_axis, 1, np.abs(kernel).max())
    with jax.enable_x64(True):
      params = jax.tree.map(
        lambda p: jnp.asarray(p, jnp.float64),
        {**variables['params'], 'kernel': rounded_w},  # noqa: B023
      )
      exact, pull_back = jax.vjp(
        lambda p, x: plain.clone(param_dtype=jnp.float64).apply({'params': p}, x),
        params,
        jnp.asarray(rounded_x),
      )
      exact_params_bar, exact_x_bar = pull_back(
        jnp.asarray(noise[: exact.size].reshape(exact.shape), jnp.float64)
      )
    # Nothing is clipped: the gradient is that of the product, everywhere.
    for actual, expected in (
      (y, exact),
      (x_bar, exact_x_bar),
      (params_bar['kernel'], exact_params_bar['kernel']),
    ):
      error = np.abs(np.asarray(actual, np.float64) - np.asarray(expected)).max()
      assert error < 1e-5 * np.abs(expected).max(), (name, error)
  assert outputs._cache_size() == 1


def test_a_stack_of_layers_without_blocks_has_none():
  _, _, layers, _, _ = case('dense')
  bound = build_space(layers, ('int4', 'bf16')).bind(jnp.zeros(1, jnp.int32))
  assert bound[''].formats.weights.blocks is None
  bound = uniform_space(layers, 'nvfp4').bind(jnp.zeros(0, jnp.int32))
  assert bound[''].formats.weights.blocks.sizes == (16,)


def test_the_network_in_bfloat16_computes_the_same_for_exact_products():
  # One input feature beside zeros: no sum whose order could matter.
  x = np.zeros((4, 32), np.float32)
  x[:, 5] = [1.5, -0.75, 3, 0.1]
  model = [make_searchable(nn.Dense(3, dtype=d)) for d in (jnp.bfloat16, jnp.float32)]
  layers = discover(model[0], x)
  variables = model[0].init(jax.random.key(0), x)
  stats = {'mean_square': np.float32(1), 'absmax': np.float32(3)}
  variables = {
    'params': variables['params'],
    QUANT_STATS: jax.tree.map_with_path(
      lambda path, _: stats[path[-1].key], variables[QUANT_STATS]
    ),
  }
  x = np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32)
  names = ('nvfp4', 'mxfp4', 'mxint8')
  space = build_space(layers, names)

  @jax.jit
  def outputs(choices):
    bound = variables | {FORMATS: nest(layers, space.bind(choices))}
    return [m.apply(bound, x) for m in model]

  for choice in range(len(names)):
    low, high = (np.asarray(y, np.float32) for y in outputs(np.int32([choice])))
    np.testing.assert_array_equal(low, references.cast(high, 'bf16'))
    assert np.count_nonzero(high) > 4
