"""Networks in plain Flax, searched without a change to their code."""

import functools
import subprocess
import sys

from flax import linen as nn
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import pytest
import references

from fliqs_jax import models
from fliqs_jax.layers import call_counts as marks
from fliqs_jax.layers.layer import Layer
from fliqs_jax.layers.variables import FORMATS, LAYER_FORMATS, QUANT_STATS, nest
from fliqs_jax.linen import discovery
from fliqs_jax.linen.interception import make_searchable
from fliqs_jax.numerics.formats import get_format
from fliqs_jax.numerics.products import LayerFormats
from fliqs_jax.search import space as search_space

NO_CHOICES = jnp.zeros(0, jnp.int32)
TOKENS, WIDTH = 6, 8


class Body(nn.Module):
  @nn.compact
  def __call__(self, x, _):
    return x + nn.remat(nn.Dense)(WIDTH, name='dense')(nn.relu(x)), None


class Everything(nn.Module):
  """A layer of each kind, in each transformation."""

  @nn.compact
  def __call__(self, tokens):
    x = nn.Embed(10, WIDTH, name='embed')(tokens)
    x = nn.MultiHeadDotProductAttention(2, name='attention')(x, x)
    x = nn.Conv(WIDTH, (3,), name='conv')(x)
    x = nn.Einsum((WIDTH, 2, 4), 'b t h, h n d -> b t n d', name='einsum')(x)
    x = nn.DenseGeneral(WIDTH, axis=(-2, -1), name='merge')(x)
    x = nn.ConvTranspose(WIDTH, (3,), strides=(2,), name='transposed')(x)
    scan = {'variable_axes': {'params': 0}, 'split_rngs': {'params': True}}
    x, _ = nn.scan(Body, **scan, length=3)(name='scan')(x, None)
    all_axes = {'variable_axes': {True: 0}, 'split_rngs': {'params': True}}
    x, _ = nn.scan(Body, **all_axes, length=2)(name='scan_all')(x, None)
    x = nn.vmap(nn.Dense, **scan, in_axes=1, out_axes=1)(WIDTH, name='vmap')(x)
    shared = nn.Dense(WIDTH, name='shared')
    x = shared(nn.relu(shared(x)))
    x = nn.remat(nn.Dense)(4, name='remat')(x)
    x = nn.ConvLocal(4, (3,), name='local')(x)
    x = nn.Dense(4, dot_general=lax.dot_general, name='own')(x)
    return x @ self.param('matrix', nn.initializers.normal(), (4, 4))


DENSE = TOKENS * WIDTH * WIDTH
MACS = {
  'attention/query': DENSE,
  'attention/key': DENSE,
  'attention/value': DENSE,
  'attention/out': DENSE,
  'conv': 3 * DENSE,
  'einsum': DENSE,
  'merge': DENSE,
  'transposed': 3 * DENSE,  # each input element meets each element of the kernel
  # Of twice as many tokens from here on.
  'scan/dense': 3 * 2 * DENSE,
  'scan_all/dense': 2 * 2 * DENSE,
  'vmap': 2 * DENSE,
  'shared': 2 * 2 * DENSE,  # called twice
  'remat': DENSE,  # half as wide
  'local/kernel': 2 * TOKENS * 3 * 4 * 4,
  'matrix': 2 * TOKENS * 4 * 4,
}


@pytest.fixture(scope='module')
def everything():
  """The network, its searchable twin, input, and variables of both."""
  plain = Everything()
  searchable = make_searchable(plain)
  tokens = np.random.default_rng(0).integers(10, size=(2, TOKENS))
  key = jax.random.key(3)
  variables = [jax.jit(model.init)(key, tokens) for model in (plain, searchable)]
  coverage = searchable.coverage(jax.ShapeDtypeStruct((1, TOKENS), jnp.int32))
  return plain, searchable, tokens, variables, coverage


def test_macs_by_hand(everything):
  layers = everything[-1].layers
  assert {layer.path: layer.macs for layer in layers} == MACS
  calls = {layer.path: layer.calls for layer in layers if layer.calls > 1}
  assert calls == {'scan/dense': 3, 'scan_all/dense': 2, 'vmap': 12, 'shared': 2}
  weights = {
    layer.path: layer.kernels * np.prod(layer.kernel_shape) for layer in layers
  }
  params = everything[3][0]['params']
  for path, count in weights.items():
    leaf = functools.reduce(lambda tree, name: tree[name], path.split('/'), params)
    assert count == (leaf['kernel'] if isinstance(leaf, dict) else leaf).size


def test_what_is_not_searched_says_why(everything):
  skipped = everything[-1].skipped
  assert set(skipped) == {'embed', 'own'}
  assert 'looked up, as by nn.Embed' in skipped['embed']
  assert 'dot_general' in skipped['own']
  lines = str(everything[-1]).splitlines()
  assert lines[0] == f'{len(MACS)} layers are searched:'
  assert sum(line.startswith('not searched') for line in lines) == 2
  assert 0.9 < everything[-1].share < 1  # but for `own`


def test_parameters_are_those_of_the_unchanged_network(everything):
  plain, searchable = everything[3]
  jax.tree.map(np.testing.assert_array_equal, plain['params'], searchable['params'])


@pytest.fixture(scope='module')
def apply(everything):
  """Outputs, statistics and gradients of the searchable network in given formats."""
  _, searchable, tokens, (_, variables), coverage = everything

  @jax.jit
  def run(formats, quant_stats):
    def loss(params):
      y, updated = searchable.apply(
        {'params': params, QUANT_STATS: quant_stats, FORMATS: formats},
        tokens,
        mutable=[QUANT_STATS],
      )
      return jnp.sum(jnp.sin(y)), (y, updated[QUANT_STATS])

    return jax.value_and_grad(loss, has_aux=True)(variables['params'])

  def apply(name, quant_stats=variables[QUANT_STATS]):
    space = search_space.uniform_space(coverage.layers, name)
    formats = nest(space.layers, space.bind(NO_CHOICES))
    (_, (y, stats)), gradients = run(formats, quant_stats)
    return y, stats, gradients

  apply.run = run
  return apply


def test_float32_is_the_unchanged_network_bit_by_bit(everything, apply):
  plain, searchable, tokens, (variables, _), _ = everything
  expected = jax.jit(plain.apply)(variables, tokens)
  np.testing.assert_array_equal(apply('float32')[0], expected)
  unbound = jax.jit(searchable.apply)(variables, tokens)
  np.testing.assert_array_equal(unbound, expected)


def test_gradients_reach_every_parameter_and_statistics_every_layer(apply):
  _, stats, _ = apply('float32')
  # A scan that carries all collections has statistics of each iteration.
  assert {leaf.shape for leaf in jax.tree.leaves(stats)} == {(), (2,)}
  assert len(jax.tree.leaves(stats)) == 2 * (len(MACS) - 2)  # not scan, not vmap
  assert all(np.all(leaf > 0) for leaf in jax.tree.leaves(stats))
  outputs = {name: apply(name, stats)[0] for name in ('float32', 'int4', 'int2')}
  errors = [np.abs(outputs[n] - outputs['float32']).max() for n in ('int4', 'int2')]
  assert 0 < errors[0] < errors[1]
  for path, gradient in jax.tree_util.tree_leaves_with_path(apply('int4', stats)[2]):
    assert np.isfinite(gradient).all()
    # The key's bias shifts all logits of a softmax alike.
    assert np.any(gradient) or 'key' in jax.tree_util.keystr(path)
  assert apply.run._cache_size() == 1  # formats are data


# Layers whose operands are rounded, against float64.

OPERANDS = {
    'einsum': (
        functools.partial(nn.Einsum, (5, 2, 3), '...i,ijk->...jk'), (2, 4, 5), (0,)
    ),
    'einsum_batch': (
        functools.partial(nn.Einsum, (4, 5, 3), 'btd,tdf->btf'), (2, 4, 5), (1,)
    ),
    'transposed': (
        functools.partial(nn.ConvTranspose, 3, (3, 3), strides=(2, 2)),
        (2, 3, 3, 4), (0, 1, 2),
    ),
    'transposed_kernel': (
        functools.partial(
            nn.ConvTranspose, 3, (3,), transpose_kernel=True, padding='VALID'
        ),
        (2, 5, 4), (0, 2),
    ),
}  # fmt: skip


@pytest.mark.parametrize('name', OPERANDS)
def test_rounded_operands_equal_quantizing_by_hand(name):
  constructor, shape, contracted = OPERANDS[name]
  rng = np.random.default_rng(1)
  x = rng.normal(0.1, 0.7, shape).astype(np.float32)
  searchable = make_searchable(constructor())
  variables = searchable.init(jax.random.key(0), x)
  ((operator, _),) = variables[QUANT_STATS].items()
  mean_square, absmax = np.float32(0.4), np.float32(1.7)
  stats = {operator: {'mean_square': mean_square, 'absmax': absmax}}
  kernel = np.float64(variables['params']['kernel'])

  @jax.jit
  def value_and_gradients(bound):
    def loss(params, x):
      y = searchable.apply(
        {
          'params': params,
          QUANT_STATS: stats,
          FORMATS: {operator: {LAYER_FORMATS: bound}},
        },
        x,
      )
      return jnp.sum(jnp.sin(y)), y

    return jax.value_and_grad(loss, (0, 1), has_aux=True)(variables['params'], x)

  for weights, activations in (('int4', 'int8'), ('e2m1', 'int3'), ('bf16', 'int2')):
    (_, y), gradients = value_and_gradients(
      LayerFormats(get_format(weights), get_format(activations))
    )
    statistics = (
      np.mean(kernel**2, axis=contracted, keepdims=True),
      np.abs(kernel).max(axis=contracted, keepdims=True),
    )
    rounded_w, w_inside = references.fake_quantize(kernel, weights, *statistics)
    rounded_x, x_inside = references.fake_quantize(x, activations, mean_square, absmax)
    plain = constructor(dtype=jnp.float32)
    bias = variables['params']['bias']

    def loss(kernel, x, plain=plain, bias=bias):
      y = plain.apply({'params': {'kernel': kernel, 'bias': bias}}, x)
      return jnp.sum(jnp.sin(y)), y

    (_, expected), (w_bar, x_bar) = jax.value_and_grad(loss, (0, 1), has_aux=True)(
      jnp.float32(rounded_w), jnp.float32(rounded_x)
    )
    close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5)
    close(y, expected)
    close(gradients[1], np.where(x_inside, x_bar, 0))
    # The largest weight of a channel may be the threshold itself.
    inside = w_inside | np.isclose(np.abs(kernel), statistics[1])
    close(gradients[0]['kernel'], np.where(inside, w_bar, 0))


def test_a_scanned_layer_takes_thresholds_from_the_tensor_at_hand():
  class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
      dense = nn.scan(
        Body, variable_axes={'params': 0}, split_rngs={'params': True}, length=2
      )
      return dense(name='scan')(x, None)[0]

  searchable = make_searchable(Scanned())
  x = np.random.default_rng(2).normal(size=(3, WIDTH)).astype(np.float32)
  variables = searchable.init(jax.random.key(0), x)
  assert QUANT_STATS not in variables
  (layer,) = discovery.discover(searchable, x[:1])
  bound = search_space.uniform_space([layer], 'int3').bind(NO_CHOICES)
  bound = nest([layer], bound)
  actual = jax.jit(searchable.apply)({**variables, FORMATS: bound}, x)

  expected = np.float64(x)
  kernels = np.float64(variables['params']['scan']['dense']['kernel'])
  for kernel in kernels:
    h = np.maximum(np.float32(expected), 0)
    h, _ = references.fake_quantize(h, 'int3', np.mean(h**2), np.abs(h).max())
    w, _ = references.fake_quantize(
      kernel, 'int3', np.mean(kernel**2, axis=0), np.abs(kernel).max(axis=0)
    )
    expected = expected + h @ w
  np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_our_own_network_with_hooks_computes_the_same():
  make = functools.partial(
      models.create_model, 'tiny', 10, operator={}, dtype=jnp.float32,
      width=0.0625, small_images=True,
  )  # fmt: skip
  hooked, plain = make(quantized=True), make(quantized=False)
  searchable = make_searchable(plain)
  image = np.random.default_rng(0).normal(size=(1, 8, 8, 1)).astype(np.float32)
  layers = discovery.discover(hooked, image, train=False)
  assert discovery.discover(searchable, image, train=False) == layers
  # Those that have our hooks already keep them.
  assert discovery.discover(make_searchable(hooked), image, train=False) == layers
  space = search_space.build_space(layers, ('int2', 'int4', 'e4m3'))
  choices = jnp.arange(len(layers)) % 3
  variables = jax.jit(functools.partial(hooked.init, train=False))(
    jax.random.key(0), image
  )
  stats = jax.tree.map(lambda a: a + 0.7, variables[QUANT_STATS])
  formats = nest(space.layers, space.bind(choices))
  bound = {**variables, QUANT_STATS: stats, FORMATS: formats}
  outputs = [
    jax.jit(functools.partial(model.apply, train=False))(bound, image)
    for model in (hooked, searchable, make_searchable(hooked))
  ]
  np.testing.assert_array_equal(outputs[0], outputs[1])
  np.testing.assert_array_equal(outputs[0], outputs[2])


def test_a_loop_of_unknown_length_is_an_error():
  layer = Layer('block/dense', '', '', (), (), (), 1, 0)

  def network(x):
    body = lambda x: 2 * marks.marked(x, x, layer)
    return lax.while_loop(lambda x: jnp.sum(x) < 9, body, x)

  with pytest.raises(ValueError, match='block/dense runs in a loop of unknown length'):
    list(marks.marks(jax.make_jaxpr(network)(jnp.ones(2))))


# In another interpreter, where `assert` does nothing.
WITHOUT_ASSERTIONS = """
import flax.linen as nn, jax, jax.numpy as jnp
from fliqs_jax.linen.interception import make_searchable

x = jnp.ones((1, 4))
model = make_searchable(nn.Dense(2))
macs = [layer.macs for layer in model.coverage(x).layers]
variables = model.init(jax.random.key(0), x)
print(macs, jax.jit(model.apply)(variables, x).shape, __debug__)
"""


def test_discovery_ends_under_python_O():
  script = [sys.executable, '-O', '-c', WITHOUT_ASSERTIONS]
  result = subprocess.run(script, capture_output=True, text=True)
  # A trace that still recorded layers could not be compiled.
  assert result.stdout.strip() == '[8] (1, 2) False', result.stderr[-2000:]
