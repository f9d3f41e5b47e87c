"""Products of bare parameters in exports: networks with tied embeddings."""

import re

from flax import linen as nn
from flax import nnx
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_deployments import both, deploy

from fliqs_jax.errors import ConfigError
from fliqs_jax.exporting import (
  exporter,
  loading,
  onnx_file,
  qwix_files,
  safetensors_file,
  stablehlo,
)

SYMBOLS, TOKENS, WIDTH = 11, 6, 8
TEXTS = np.random.default_rng(0).integers(SYMBOLS, size=(3, TOKENS))


class Conv1D(nn.Module):
  """GPT-2's projection, whose kernel is transposed: `[features, inputs]`."""

  features: int

  @nn.compact
  def __call__(self, x):
    init = nn.initializers.normal()
    kernel = self.param('kernel', init, (self.features, x.shape[-1])).transpose()
    bias = self.param('bias', init, (self.features,))
    return lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ()))) + bias


class LinenGpt(nn.Module):
  """An embedding, a block that is computed again for gradients, and a tied head."""

  @nn.compact
  def __call__(self, tokens):
    embed = nn.Embed(SYMBOLS, WIDTH, name='wte')
    x = embed(tokens)
    x = x + nn.remat(Conv1D)(WIDTH, name='c_proj')(nn.gelu(x))
    x = nn.Dense(WIDTH, name='dense')(x)
    x = x + x @ self.param('w', nn.initializers.normal(), (WIDTH, WIDTH))
    return embed.attend(nn.LayerNorm(name='ln_f')(x))


class NnxGpt(nnx.Module):
  """The same without the block."""

  def __init__(self):
    rngs = nnx.Rngs(0)
    self.wte = nnx.Embed(SYMBOLS, WIDTH, rngs=rngs)
    self.dense = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
    self.w = nnx.Param(rngs.params.normal((WIDTH, WIDTH)))
    self.ln_f = nnx.LayerNorm(WIDTH, rngs=rngs)

  def __call__(self, tokens):
    x = self.dense(self.wte(tokens))
    return self.wte.attend(self.ln_f(x + x @ self.w))


NETWORKS = {'linen': LinenGpt, 'nnx': NnxGpt}


@pytest.fixture(scope='module', params=NETWORKS)
def given(request):
  return deploy(NETWORKS[request.param](), TEXTS, formats=both('int4'))


@pytest.fixture(scope='module')
def expected(given):
  return np.asarray(jax.jit(given.searched)(TEXTS))


def test_a_parameter_stays_where_it_is_read_otherwise_too(given):
  kept = set(given.unquantized)
  assert 'wte/embedding' in kept and given.layers['wte/embedding'].stack == ()
  assert 'w' not in kept and 'c_proj/kernel' not in kept
  assert given.replaced == {p for p in given.own_weights if p != 'wte/embedding'}


def test_codes_are_those_of_what_is_multiplied(given, tmp_path):
  safetensors_file.write(given, tmp_path)
  reader = loading.import_loader(loading.LOADERS / 'load_safetensors.py')
  found = reader.decode(tmp_path / safetensors_file.FILE)
  names = {*given.unquantized, *(layer.name for layer in given.layers.values())}
  assert set(found) == names
  embedding = given.variables['params']['wte']['embedding']
  # As it is multiplied: `attend` takes the transposed table.
  np.testing.assert_array_equal(given.own_weights['wte/embedding'], embedding.T)
  layer, decoded = given.layers['wte/embedding'], found['wte/embedding/product']
  assert layer.weight_scale.shape == (1, SYMBOLS)
  # What is not clipped is off by half a step at most, as nothing else would be.
  rounded = np.round(np.clip(embedding.T / layer.weight_scale, -7, 7))
  np.testing.assert_allclose(decoded, rounded * layer.weight_scale, rtol=1e-6)


@pytest.mark.parametrize('target', [stablehlo, onnx_file])
def test_targets_compute_what_the_search_does(target, given, expected, tmp_path):
  target.write(given, tmp_path)
  loader = loading.import_loader(loading.LOADERS / target.LOADER)
  found = loader.load(tmp_path / target.FILE)(TEXTS)
  found = found[0] if target is onnx_file else found
  np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_floats_are_in_the_program_only_where_they_are_looked_up(given, tmp_path):
  stablehlo.write(given, tmp_path)
  content = (tmp_path / stablehlo.FILE).read_bytes()
  program = jax.export.deserialize(bytearray(content)).mlir_module()
  shapes = re.findall(r'dense<["\[][^:]*> : tensor<([\dx]*)xf32>', program)
  assert f'{SYMBOLS}x{WIDTH}' in shapes and f'{WIDTH}x{WIDTH}' not in shapes


def test_a_module_has_no_rule_for_them(given):
  lines = exporter.refused_layers(given, 'qwix')
  assert any(
    line.startswith("layer 'wte/embedding': it is a product") for line in lines
  )
  assert not any("'dense'" in line for line in lines)
  assert qwix_files.refused(given.layers['dense']) is None


class Halves(nn.Module):
  """One parameter, of which two products take a half each."""

  @nn.compact
  def __call__(self, x):
    w = self.param('w', nn.initializers.normal(), (2, 4, 4))
    return x @ w[0] @ w[1]


class Scanned(nn.Module):
  """One parameter, of which each turn of a scan takes a part, transposed."""

  axis: int = 0  # along which it is scanned
  is_read: bool = False  # otherwise too

  @nn.compact
  def __call__(self, x):
    shape = [4, 4]
    shape.insert(self.axis, 3)
    w = self.param('w', nn.initializers.normal(), shape)
    step = lambda x, w: (jnp.tanh(x @ w.T), None)
    x, _ = lax.scan(step, x, jnp.moveaxis(w, self.axis, 0))
    return x + jnp.sum(w) if self.is_read else x


class Joined(nn.Module):
  """Weights that are made of several parameters."""

  @nn.compact
  def __call__(self, x):
    init = nn.initializers.normal()
    parts = [self.param(name, init, (4, n)) for name, n in (('q', 2), ('k', 3))]
    return x @ jnp.concatenate(parts, 1) * self.param('scale', init, (5,))


class Normed(nn.Module):
  """A layer whose kernel has directions and lengths of its own."""

  @nn.compact
  def __call__(self, x):
    return nn.WeightNorm(nn.Dense(5, name='dense'))(x)


X = np.random.default_rng(1).normal(size=(2, 4)).astype(np.float32)


@pytest.mark.parametrize('target', [stablehlo, onnx_file])
@pytest.mark.parametrize(
  'network, shape, kept',
  [
    (Scanned(), (3, 4, 4), set()),
    (Joined(), (4, 5), {'scale'}),
    (Normed(), (4, 5), {'dense/bias'}),
  ],
  ids=['scanned', 'joined', 'normed'],
)
def test_weights_of_several_elements_or_parameters(
  network, shape, kept, target, tmp_path
):
  given = deploy(network, X)
  ((_, layer),) = given.layers.items()
  assert layer.codes.shape == shape
  assert set(given.unquantized) == kept
  target.write(given, tmp_path)
  loader = loading.import_loader(loading.LOADERS / target.LOADER)
  found = loader.load(tmp_path / target.FILE)(X)
  found = found[0] if target is onnx_file else found
  np.testing.assert_allclose(found, given.searched(X), atol=1e-6)


@pytest.mark.parametrize(
  'network, message',
  [
    (Halves(), "'w' is multiplied in different parts"),
    (Scanned(axis=1), "'w' is multiplied in a loop"),
    (Scanned(is_read=True), "'w' is multiplied in a loop, and read otherwise too"),
  ],
)
def test_what_is_not_one_matrix_is_refused(network, message):
  with pytest.raises(ConfigError, match=message):
    deploy(network, X)
