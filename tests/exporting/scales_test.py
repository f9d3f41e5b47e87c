"""Deployed layers with scales of blocks and of tokens, in stacks, in attention."""

from flax import linen as nn
from flax import nnx, traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_deployments import Nested, Stacked, both, deploy

from fliqs_jax.exporting import loading, safetensors_file, stablehlo


def check(given, x):
  expected = given.searched(x)
  size = float(jnp.max(jnp.abs(expected)))
  np.testing.assert_allclose(given.deployed(x), expected, atol=1e-5 * size)


BLOCKS = ('mxfp8_e4m3', 'mxfp4', 'nvfp4', 'int4_b32', 'int8_b32')


@pytest.mark.parametrize('name', BLOCKS)
def test_blocks_are_packed_with_their_scales_and_decoded_by_numpy(name, tmp_path):
  x = jax.random.normal(jax.random.key(0), (2, 72))  # the last block is shorter
  given = deploy(nn.Dense(3), x, formats=both(name))
  check(given, x)
  safetensors_file.write(given, tmp_path)
  reader = loading.import_loader(loading.LOADERS / 'load_safetensors.py')
  found = reader.decode(tmp_path / safetensors_file.FILE)
  np.testing.assert_array_equal(found['kernel'], given.layers[''].decoded())
  block = given.layers[''].block_scale
  size = safetensors_file.sizes(given)
  assert block.shape == (-(-72 // (16 if name == 'nvfp4' else 32)), 3)
  assert size['block_scales'] == block.nbytes
  assert size['codes'] == 72 * 3 * (4 if '4' in name[:5] or name == 'mxfp4' else 8) // 8


@pytest.mark.parametrize('name', ['int8', 'int4', 'e4m3'])
def test_each_token_has_a_scale(name):
  x = jax.random.normal(jax.random.key(0), (2, 5, 8)) * jnp.arange(1, 6)[:, None]
  given = deploy(nn.Dense(3), x, formats=both(name), shared_scale='token')
  check(given, x)
  check(given, x.at[:, 2].set(0))  # whose own scale would be 0


class Body(nn.Module):
  """One layer of a stack."""

  @nn.compact
  def __call__(self, x, _):
    return nn.tanh(nn.Dense(8, name='dense')(x)), None


class Stack(nn.Module):
  """Three layers in a scan, whose statistics it carries or not."""

  axes: tuple = ('params', 'quant_stats')

  @nn.compact
  def __call__(self, x):
    scan = nn.scan(
      Body,
      variable_axes=dict.fromkeys(self.axes, 0),
      split_rngs={'params': True},
      length=3,
    )
    return scan(name='scan')(x, None)[0]


@pytest.mark.parametrize('axes', [('params', 'quant_stats'), ('params',)])
@pytest.mark.parametrize('name', ['int4', 'e4m3'])
def test_layers_of_a_scan_have_codes_of_their_own(name, axes):
  x = jax.random.normal(jax.random.key(0), (4, 8))
  given = deploy(Stack(axes), x, formats=both(name))
  assert given.layers['scan/dense'].stack == (3,)
  check(given, x)


@pytest.mark.parametrize('make, stack', [(Stacked, (3,)), (Nested, (2, 3))])
def test_layers_of_an_nnx_scan_are_exported(make, stack, tmp_path):
  x = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
  given = deploy(make(nnx.Rngs(0)), x)
  ((_, layer),) = given.layers.items()
  assert layer.stack == stack
  check(given, x)
  stablehlo.write(given, tmp_path)
  loader = loading.import_loader(loading.LOADERS / stablehlo.LOADER)
  found = loader.load(tmp_path / stablehlo.FILE)(x)
  np.testing.assert_allclose(found, given.searched(x), atol=1e-5)


def test_products_inside_attention_are_computed_as_in_the_search(tmp_path):
  x = jax.random.normal(jax.random.key(0), (2, 5, 8))
  network = nn.MultiHeadDotProductAttention(num_heads=2)
  given = deploy(network, x, attention_products=True)
  assert [pair.path for pair in given.pairs] == ['qk', 'av']
  assert set(given.layers) == {'query', 'key', 'value', 'out'}
  check(given, x)
  kept = traverse_util.flatten_dict(given.unquantized, sep='/')
  assert set(kept) == {f'{name}/bias' for name in given.layers}
