"""Searches over block formats: one compile, fractions of bits, and what is refused."""

from conftest import load_config
from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fliqs_jax
from fliqs_jax.errors import ConfigError
from fliqs_jax.linen.discovery import discover
from fliqs_jax.linen.interception import make_searchable
from fliqs_jax.reporting import figure_style, tables, terminal
from fliqs_jax.runs import setup as setup_lib
from fliqs_jax.runs.config import default_config, resolve
from fliqs_jax.search import devices
from fliqs_jax.search.cost_models import get_cost_model
from fliqs_jax.search.space import build_space, check_blocks, fixed_space, uniform_space

NAMES = ('nvfp4', 'mxfp8_e4m3', 'int4_b32', 'bf16')
NO_CHOICES = np.zeros(0, np.int32)


class Network(nn.Module):
  """A stem of three channels, a depthwise layer, and two that have blocks."""

  @nn.compact
  def __call__(self, x):
    x = nn.relu(nn.Conv(40, (3, 3), name='stem')(x))
    x = nn.Conv(40, (3, 3), feature_group_count=40, name='depthwise')(x)
    x = nn.relu(nn.Conv(48, (1, 1), name='pointwise')(x))
    return nn.Dense(10, name='classifier')(jnp.mean(x, axis=(1, 2)))


@pytest.fixture(scope='module')
def layers():
  image = jax.ShapeDtypeStruct((1, 4, 4, 3), jnp.float32)
  return discover(make_searchable(Network()), image)


def test_contractions_of_layers(layers):
  found = {layer.path: layer.contraction_length for layer in layers}
  assert found == {'stem': 3, 'depthwise': 1, 'pointwise': 40, 'classifier': 48}


def test_blocks_longer_than_a_contraction_are_refused(layers):
  with pytest.raises(ConfigError) as error:
    check_blocks(build_space(layers, (*NAMES, 'int4_b64')))
  assert [line.partition(':')[0] for line in error.value.problems] == [
    'nvfp4 has blocks of 16 values',
    'mxfp8_e4m3 has blocks of 32 values',
    'int4_b32 has blocks of 32 values',
    'int4_b64 has blocks of 64 values',
  ]
  first, *_, last = error.value.problems
  assert 'found stem (3), depthwise (1); pin these' in first
  assert 'found stem (3), depthwise (1), pointwise (40), classifier (48)' in last
  with pytest.raises(ConfigError, match='mxfp4 has blocks of 32.*stem'):
    check_blocks(uniform_space(layers, 'mxfp4'))
  pins = [('stem|depthwise', 'bf16')]
  check_blocks(build_space(layers, NAMES, pins=pins))


def test_costs_have_fractions_of_bits(layers):
  pair = {'weights': 'int4_b128', 'activations': 'nvfp4'}
  space = fixed_space(layers[3:], {'classifier': pair})
  assert get_cost_model('bops')(space, NO_CHOICES) * 1e9 == 480 * 4.125 * 4.5
  assert get_cost_model('model_size')(space, NO_CHOICES) == 480 * 4.125 / 8
  assert get_cost_model('activation_bytes')(space, NO_CHOICES) == 48 * 4.5 / 8


def test_reports_know_block_formats():
  assert figure_style.family('nvfp4') == 'float'
  assert figure_style.family('int4_b32') == 'integer'
  assert figure_style.family('64') == 'architecture'
  options = ['bf16', 'int8', 'nvfp4', 'mxfp4', 'int4']
  ordered = ['int4', 'mxfp4', 'nvfp4', 'int8', 'bf16']
  assert sorted(options, key=tables.option_order) == ordered


def test_device_stands_for_its_fast_formats():
  config = default_config()
  config.search.update(formats='device', device='b300')
  assert resolve(config).search.formats == (
    'mxfp4,nvfp4,mxfp6_e2m3,mxfp6_e3m2,mxfp8_e4m3,mxfp8_e5m2,bf16'
  )
  config.search.device = 'tpu_v4'
  with pytest.raises(ConfigError, match='tpu_v4 multiplies no format faster'):
    resolve(config)


@pytest.mark.parametrize(
  ('variant', 'names', 'between'),
  [
    ('blackwell', ('nvfp4', 'mxfp8_e4m3', 'bf16'), ('nvfp4', 'mxfp8_e4m3')),
    ('ironwood', ('e4m3', 'e5m2', 'bf16'), ('e4m3', 'bf16')),
  ],
)
def test_recipes_for_chips(variant, names, between):
  config = resolve(load_config('transformer_lm', variant))
  config.model.update(depth=1)
  setup = setup_lib.build(config, jax.device_count())
  assert all(decision.options == names for decision in setup.space.decisions)
  low, high = (setup.cost_model.uniform(setup.space.layers, name) for name in between)
  assert low < setup.target < high
  device = devices.get_device(config.search.device)
  assert all(devices.is_native(device, name) for name in names)


class Dense(nn.Module):
  """Two layers, of which the second has a shorter last block."""

  @nn.compact
  def __call__(self, x):
    return nn.Dense(4)(nn.relu(nn.Dense(40)(x)))


def test_a_whole_search(tmp_path, capsys):
  rng = np.random.default_rng(0)
  x = rng.normal(size=(16, 32)).astype(np.float32)
  batch = {'image': x, 'label': np.argmax(x[:, :4], axis=1)}
  result = fliqs_jax.search(
    Dense(), [batch], [batch], workdir=tmp_path / 'run', num_steps=12, log_every=6,
    num_samples=2, formats=','.join(NAMES), strategy='policy_gradient',
    cost_model='roofline', device='h100',
    target_format='nvfp4', target_scale=1.5,
  )  # fmt: skip
  assert {f['weights'] for f in result.formats.values()} <= set(NAMES)
  assert result.cost <= 1.001 * result.target
  bits = {'nvfp4': 4.5, 'mxfp8_e4m3': 8.25, 'int4_b32': 4.5, 'bf16': 16}
  for path, found in result.formats.items():
    assert result.content['layers'][path]['bits'] == {
      operand: bits[name] for operand, name in found.items()
    }
  terminal.print_result(result.content, 'DIR')
  printed = capsys.readouterr().out
  assert '4.5 × 4.5' in printed or '8.25 × 8.25' in printed
  assert 'is emulated on h100: multiplied in bf16, at 989 TFLOPS' in printed
  # Whatever the cost, where a device is named.
  search = result.content['config']['search']
  for device, warned in ('h100', True), ('tpu_v5e', True), (None, False):
    config = result.content['config'] | {'search': search | {'device': device}}
    content = result.content | {'cost_model': 'bops', 'config': config}
    terminal.print_result(content, 'DIR')
    assert ('is emulated on' in capsys.readouterr().out) == warned
  y = jax.jit(result.model.apply)(result.variables, x)
  plain = jax.jit(Dense().apply)({'params': result.variables['params']}, x)
  assert 0 < np.abs(y - plain).max() < np.abs(plain).max()
