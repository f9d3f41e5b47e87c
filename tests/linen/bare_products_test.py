"""Products of parameters outside of Flax's layers, against hand counts, and layers."""

import functools

from flax import linen as nn
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import pytest

from fliqs_jax.errors import ConfigError
from fliqs_jax.layers.parameter_products import OPERATOR
from fliqs_jax.layers.variables import FORMATS, QUANT_STATS, nest
from fliqs_jax.linen.discovery import discover
from fliqs_jax.linen.interception import make_searchable
from fliqs_jax.search import space as search_space
from fliqs_jax.search.cost_models import get_cost_model

TOKENS, WIDTH, SYMBOLS, DEPTH, HEADS = 6, 8, 10, 2, 2
NO_CHOICES = jnp.zeros(0, jnp.int32)


class Conv1D(nn.Module):
  """The projection of the widespread Flax GPT-2, `kernel: [features, inputs]`."""

  features: int

  @nn.compact
  def __call__(self, x):
    kernel = self.param(
      'kernel', nn.initializers.normal(0.2), (self.features, x.shape[-1])
    )
    bias = self.param('bias', nn.initializers.zeros, (self.features,))
    kernel = jnp.asarray(kernel.transpose(), x.dtype)
    return lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ()))) + bias


class Dense(nn.Module):
  """The same product by Flax's own layer, `kernel: [inputs, features]`."""

  features: int

  @nn.compact
  def __call__(self, x):
    return nn.Dense(self.features, name='dense')(x)


class Block(nn.Module):
  projection: type[nn.Module]

  @nn.compact
  def __call__(self, x):
    h = self.projection(3 * WIDTH, name='c_attn')(nn.LayerNorm(name='ln_1')(x))
    q, k, v = (a.reshape(*a.shape[:2], HEADS, -1) for a in jnp.split(h, 3, axis=-1))
    h = nn.dot_product_attention(q, k, v).reshape(x.shape)
    x = x + self.projection(WIDTH, name='c_proj')(h)
    h = nn.gelu(self.projection(4 * WIDTH, name='c_fc')(nn.LayerNorm(name='ln_2')(x)))
    return x + self.projection(WIDTH, name='c_out')(h)


class Gpt2(nn.Module):
  """A language model whose head is the transposed embedding."""

  projection: type[nn.Module] = Conv1D
  remat: bool = False

  @nn.compact
  def __call__(self, tokens):
    wte = nn.Embed(SYMBOLS, WIDTH, name='wte')
    positions = self.param('wpe', nn.initializers.normal(0.2), (TOKENS, WIDTH))
    x = wte(tokens) + positions
    block = nn.remat(Block) if self.remat else Block
    for i in range(DEPTH):
      x = block(self.projection, name=f'h_{i}')(x)
    return wte.attend(nn.LayerNorm(name='ln_f')(x))


# By hand: tokens · inputs · outputs.
MACS = {
  **{
    f'h_{i}/{name}/kernel': TOKENS * WIDTH * WIDTH * factor
    for i in range(DEPTH)
    for name, factor in (('c_attn', 3), ('c_proj', 1), ('c_fc', 4), ('c_out', 4))
  },
  'wte/embedding': TOKENS * WIDTH * SYMBOLS,
}


@pytest.fixture(scope='module')
def gpt2():
  """Networks with bare products and with layers, their coverages, and variables."""
  tokens = np.random.default_rng(0).integers(SYMBOLS, size=(2, TOKENS))
  networks = {
    'bare': make_searchable(Gpt2()),
    'layers': make_searchable(Gpt2(Dense)),
    'remat': make_searchable(Gpt2(remat=True)),
  }
  coverages = {n: network.coverage(tokens[:1]) for n, network in networks.items()}
  variables = jax.jit(networks['bare'].init)(jax.random.key(0), tokens)
  return networks, coverages, variables, tokens


def test_nine_of_nine_products_with_costs_as_counted_by_hand(gpt2):
  _, coverages, variables, tokens = gpt2
  coverage = coverages['bare']
  assert {layer.path: layer.macs for layer in coverage.layers} == MACS
  assert [layer.path for layer in coverage.layers] == list(MACS)  # as they compute
  assert coverage.share == 1
  assert coverages['remat'].layers == coverage.layers
  bops = get_cost_model('bops').uniform(coverage.layers, 'int4')
  assert bops == pytest.approx(16 * sum(MACS.values()) / 1e9)
  for layer in coverage.layers:
    leaf = functools.reduce(
      lambda tree, name: tree[name], layer.path.split('/'), variables['params']
    )
    assert layer.params == np.prod(layer.kernel_shape) == leaf.size
    assert layer.kind == 'dense' and layer.kernels == 1
  assert discover(gpt2[0]['bare'], tokens[:1]) == coverage.layers
  # The positions are added, and multiplied by nothing.
  assert list(coverage.skipped) == ['wpe'] and 'elementwise' in coverage.skipped['wpe']
  assert '100.0% of the multiply-accumulates by parameters' in str(coverage)


def runner(network, coverage, tokens):
  """A function to outputs, new statistics and gradients under one format."""

  @jax.jit
  def run(variables, formats):
    def loss(params):
      y, updated = network.apply(
        {**variables, 'params': params, FORMATS: formats}, tokens, mutable=[QUANT_STATS]
      )
      return jnp.sum(jnp.sin(y)), (y, updated[QUANT_STATS])

    (_, (y, stats)), gradients = jax.value_and_grad(loss, has_aux=True)(
      variables['params']
    )
    return y, stats, gradients

  def in_format(variables, name):
    space = search_space.uniform_space(coverage.layers, name)
    return run(variables, nest(space.layers, space.bind(NO_CHOICES)))

  return in_format


def as_layers(tree):
  """Parameters or statistics of the bare network in the form of that with layers."""
  if not isinstance(tree, dict):
    return tree
  if 'kernel' in tree and isinstance(tree['kernel'], dict):
    return {'dense': {'QuantizedDotGeneral_0': tree['kernel'][OPERATOR]}}
  if 'kernel' in tree:
    return {'dense': {'kernel': tree['kernel'].T, 'bias': tree['bias']}}
  return {name: as_layers(value) for name, value in tree.items()}


def test_they_compute_as_layers_of_flax_do(gpt2):
  networks, coverages, variables, tokens = gpt2
  unquantized = jax.jit(networks['bare'].model.apply)(
    {'params': variables['params']}, tokens
  )
  close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
  run = {name: runner(networks[name], coverages[name], tokens) for name in networks}
  close(run['bare'](variables, 'float32')[0], unquantized)
  # After one call there are statistics of the activations.
  _, stats, _ = run['bare'](variables, 'int4')
  assert all(leaf > 0 for leaf in jax.tree.leaves(stats))
  assert len(jax.tree.leaves(stats)) == 2 * len(MACS)
  variables = {**variables, QUANT_STATS: stats}
  ours = run['bare'](variables, 'int4')
  theirs = run['layers'](as_layers(variables), 'int4')
  jax.tree.map(close, tuple(map(as_layers, ours)), theirs)
  assert np.abs(ours[0] - unquantized).max() > 0.01
  jax.tree.map(close, run['remat'](variables, 'int4'), ours)


class Many(nn.Module):
  """A parameter in each kind of product, and in each that cannot be searched."""

  @nn.compact
  def __call__(self, x):
    def parameter(name, *shape):
      return self.param(name, nn.initializers.normal(0.5), shape)

    outputs = [
      x @ parameter('matmul', 8, 4),
      jnp.einsum('btd,dnh->bnth', x, parameter('einsum', 8, 2, 3)),
      jnp.einsum('of,btf->bto', parameter('left', 5, 8), x),
      jnp.einsum('btd,fdt->btf', x, parameter('batched', 4, 8, TOKENS)),
      lax.conv_general_dilated(
        x, parameter('conv', 3, 8, 4), (1,), 'SAME',
        dimension_numbers=('NWC', 'WIO', 'NWC'),
      ),
      lax.scan(
        lambda carry, w: (carry @ w, None), x, parameter('scanned', 3, 8, 8)
      )[0],
      lax.cond(x.sum() > 0, lambda x, w: x @ w, lambda x, w: x, x,
               parameter('branch', 8, 8)),
      nn.Dense(4, dot_general=lax.dot_general, name='own')(x),
      twice(x, parameter('hidden', 8, 8)),
      x * parameter('scale', TOKENS, 8),
    ]  # fmt: skip
    return [jnp.tanh(y) for y in outputs]


@jax.custom_jvp
def twice(x, w):
  return 2 * (x @ w)


@twice.defjvp
def _(primals, tangents):
  return twice(*primals), twice(tangents[0], primals[1])


def test_every_kind_of_product_is_quantized():
  x = np.random.default_rng(0).normal(size=(2, TOKENS, 8)).astype(np.float32)
  network = make_searchable(Many())
  coverage = network.coverage(x[:1])
  expected = {
    'matmul': 8 * 4, 'einsum': 8 * 6, 'left': 8 * 5, 'batched': 8 * 4,
    'conv': 3 * 8 * 4, 'scanned': 3 * 64, 'branch': 64,
  }  # fmt: skip
  found = {layer.path: layer.macs for layer in coverage.layers}
  assert found == {name: TOKENS * macs for name, macs in expected.items()}
  not_found = 8 * 4 + 64  # of `own` and `hidden`
  total = not_found + sum(expected.values())
  assert coverage.share == pytest.approx(1 - not_found / total)
  assert 'WARNING: 16.' in str(coverage) and 'dot_general' in coverage.skipped['own']
  variables = network.init(jax.random.key(1), x)
  plain = Many().apply({'params': variables['params']}, x)
  assert set(variables[QUANT_STATS]) == set(found)

  @jax.jit
  def outputs(formats):
    return network.apply({**variables, FORMATS: formats}, x, mutable=[QUANT_STATS])

  space = search_space.uniform_space(coverage.layers, 'float32')
  same, _ = outputs(nest(space.layers, space.bind(NO_CHOICES)))
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
  jax.tree.map(close, same, plain)
  space = search_space.uniform_space(coverage.layers, 'int3')
  rounded, updated = outputs(nest(space.layers, space.bind(NO_CHOICES)))
  changed = [np.abs(a - b).max() > 1e-3 for a, b in zip(rounded, plain)]
  assert changed == [True] * 7 + [False] * 3
  for name in found:
    statistics = updated[QUANT_STATS][name][OPERATOR]
    # In the scan each element of the parameter has its own.
    first = statistics['absmax'].ravel()[0]
    assert first == np.abs(x).max()
    assert statistics['absmax'].shape == ((3,) if name == 'scanned' else ())
  assert outputs._cache_size() == 1


def jitted_method():
  class Network(nn.Module):
    @nn.jit
    @nn.compact
    def __call__(self, x):
      return nn.Dense(4)(x)

  return Network()


@pytest.mark.parametrize('make', [lambda: nn.jit(Conv1D)(4), jitted_method])
def test_a_part_in_nn_jit_is_refused_at_once(make):
  x, model = np.ones((1, 8), np.float32), make()
  model.apply(model.init(jax.random.key(0), x), x)  # compiled before
  with pytest.raises(ConfigError, match='a part in nn.jit'):
    make_searchable(model).coverage(x)


def test_calls_are_counted_in_a_call_and_not_in_init():
  # Weight norm calls its layer in `init` once more.
  model = nn.WeightNorm(nn.Dense(8, name='dense'))
  (layer,) = make_searchable(model).coverage(np.ones((1, 6), np.float32)).layers
  assert (layer.macs, layer.calls) == (48, 1)


def test_a_product_in_a_loop_of_unknown_length_is_not_searched():
  class Loop(nn.Module):
    @nn.compact
    def __call__(self, x):
      w = self.param('w', nn.initializers.normal(), (8, 8))
      return lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ w + 1, x)

  coverage = make_searchable(Loop()).coverage(np.ones((1, 8), np.float32))
  assert coverage.layers == () and coverage.share == 0
  assert 'a loop of unknown length' in coverage.skipped['w']
  assert 'WARNING: 100.0% of the multiply-accumulates' in str(coverage)


def test_weights_of_several_parameters_are_one_layer():
  class Parts(nn.Module):
    @nn.compact
    def __call__(self, x):
      parts = [self.param(n, nn.initializers.normal(), (8, 4)) for n in ('a', 'b')]
      return x @ jnp.concatenate(parts, axis=1)

  coverage = make_searchable(Parts()).coverage(np.ones((1, 8), np.float32))
  (layer,) = coverage.layers
  assert layer.params == 2 * 8 * 4 and layer.kernels == 1
  assert not coverage.skipped and coverage.share == 1
