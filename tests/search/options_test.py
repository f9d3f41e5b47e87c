"""Pairs of formats: what they are called, decided, bound, priced and found as."""

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fliqs_jax
from fliqs_jax.errors import ConfigError
from fliqs_jax.layers.variables import FORMATS, nest
from fliqs_jax.linen.discovery import discover
from fliqs_jax.linen.interception import make_searchable
from fliqs_jax.numerics import formats
from fliqs_jax.reporting import figure_style, tables
from fliqs_jax.reporting.overview import describe_device
from fliqs_jax.runs import files
from fliqs_jax.runs.config import default_config, resolve
from fliqs_jax.search import assignments, devices, options
from fliqs_jax.search.cost_models import get_cost_model
from fliqs_jax.search.space import build_space, fixed_space, uniform_space
from fliqs_jax.search.strategies.actor_critic import _option_errors

PAIRS = ('int4:int8', 'int4:bf16', 'int8', 'bf16')


class Network(nn.Module):
  """Two layers of 8·6 and 6·4 multiply-accumulates."""

  @nn.compact
  def __call__(self, x):
    return nn.Dense(4, name='head')(nn.relu(nn.Dense(6, name='body')(x)))


@pytest.fixture(scope='module')
def model():
  return make_searchable(Network())


@pytest.fixture(scope='module')
def layers(model):
  return discover(model, jnp.ones((1, 8)))


def test_a_pair_of_equal_formats_is_the_format():
  assert options.parse('int4 : int8, int8:int8,bf16') == ('int4:int8', 'int8', 'bf16')
  assert options.parse('int_small') == formats.SPACES['int_small']
  for name in formats.NAMES + formats.BLOCK_NAMES:
    assert options.join(*options.split(name)) == name
    assert options.split(options.join(name, 'bf16')) == (name, 'bf16')


@pytest.mark.parametrize(
  ('spec', 'message'),
  [
    ('int4:', "^'int4:' is no pair of formats: expected WEIGHTS:ACTIVATIONS"),
    ('int4:int8:bf16', 'is no pair of formats'),
    ('int8:int9', "^unknown format 'int9'"),
    ('int8,int8:int8', 'named twice'),
  ],
)
def test_what_is_no_pair_is_an_error(spec, message):
  with pytest.raises(ConfigError, match=message):
    options.parse(spec)


def test_choices_of_pairs_are_formats_of_operands(layers):
  space = build_space(layers, PAIRS, 'pairs')
  assert [decision.options for decision in space.decisions] == [PAIRS, PAIRS]
  found = space.formats_of(np.array([0, 1], np.int32))
  assert found == {
    'body': {'weights': 'int4', 'activations': 'int8'},
    'head': {'weights': 'int4', 'activations': 'bf16'},
  }
  for choices in np.ndindex(4, 4):
    choices = np.array(choices, np.int32)
    np.testing.assert_array_equal(space.choices_of(space.formats_of(choices)), choices)
  found['head']['activations'] = 'int4'
  with pytest.raises(ConfigError, match='head: activations in int4 are outside'):
    space.choices_of(found)
  found['head'] = {'weights': 'bf16', 'activations': 'int8'}
  with pytest.raises(ConfigError, match="'head' already has bf16"):
    space.choices_of(found)


def test_a_pair_costs_what_its_formats_cost(layers):
  space = build_space(layers, PAIRS, 'pairs')
  bops = get_cost_model('bops')
  assert round(1e9 * bops(space, np.array([0, 1]))) == 48 * 4 * 8 + 24 * 4 * 16
  assert round(1e9 * bops.uniform(layers, 'int4:int8')) == 72 * 4 * 8
  sizes = get_cost_model('model_size')(space, np.array([1, 2]))
  assert sizes == (48 * 4 + 24 * 8) / 8


def test_a_pair_computes_as_the_two_formats_given_by_hand(model, layers):
  x = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32)
  variables = model.init(jax.random.key(0), x)
  space = build_space(layers, PAIRS, 'pairs')

  @jax.jit
  def outputs(choices):
    bound = nest(layers, space.bind(choices))
    return model.apply({**variables, FORMATS: bound}, x)

  for choices in ([0, 1], [1, 0], [2, 3]):
    choices = np.array(choices, np.int32)
    by_hand = fixed_space(layers, space.formats_of(choices))
    bound = nest(layers, by_hand.bind(np.zeros(0, np.int32)))
    expected = jax.jit(model.apply)({**variables, FORMATS: bound}, x)
    np.testing.assert_array_equal(outputs(choices), expected)
  assert outputs._cache_size() == 1


def test_pairs_are_pins_targets_and_assignments(layers):
  space = build_space(layers, ('int8', 'bf16'), pins=[('head', 'int4:bf16')])
  assert (space.weights[1], space.activations[1]) == ('int4', 'bf16')
  both = {'weights': 'int4', 'activations': 'int8'}
  assert assignments.parse({'.*': 'int4:int8'}, 'it') == {'.*': both}
  assert files.read_formats('int4:int8') == 'int4:int8'
  assert uniform_space(layers, 'int4:int8').formats_of(np.zeros(0, np.int32)) == {
    'body': both,
    'head': both,
  }


@pytest.mark.parametrize('operands', ['separate', 'weights'])
def test_pairs_are_refused_where_operands_are_decided_alone(layers, operands):
  with pytest.raises(ConfigError, match=f'int4:int8 is a pair.*found {operands}'):
    build_space(layers, PAIRS, operands)


@pytest.mark.parametrize(
  ('device', 'names', 'expected'),
  [
    (
      'tpu_v5e',
      ('int4', 'int8', 'bf16'),
      ('int4', 'int4:int8', 'int4:bf16', 'int8', 'int8:bf16', 'bf16'),
    ),
    # int4 is stored and unpacked; int8 and fp8 share no type.
    (
      'h100',
      ('int4', 'int8', 'e4m3'),
      ('int4:int8', 'int4:e4m3', 'int8', 'e4m3'),
    ),
    ('tpu_7x', ('int4:e4m3', 'e4m3'), ('int4:e4m3', 'e4m3')),
    # The matrix unit applies MX scales to both; those of NVFP4 are of another kind.
    (
      'b200',
      ('nvfp4', 'mxfp4', 'mxfp8_e4m3', 'bf16'),
      ('nvfp4', 'nvfp4:bf16', 'mxfp4', 'mxfp4:mxfp8_e4m3', 'mxfp4:bf16',
       'mxfp8_e4m3', 'mxfp8_e4m3:bf16', 'bf16'),
    ),
    ('a100', ('int4_b128', 'bf16'), ('int4_b128:bf16', 'bf16')),
  ],
)  # fmt: skip
def test_pairs_of_devices(device, names, expected):
  assert devices.native_pairs(device, names) == expected
  assert devices.native_pairs(device, expected) == expected
  for option in expected:  # at the rate of the wider of the two, alone
    rate = devices.rate(devices.get_device(device), *options.split(option))
    assert rate in devices.get_device(device).peaks.values()


def test_a_pair_that_a_device_lacks_is_an_error():
  with pytest.raises(ConfigError, match='^int8:e4m3 is no pair that h100.*run in bf16'):
    devices.native_pairs('h100', ['int8', 'int8:e4m3'])
  config = default_config()
  config.search.update(
    formats='int8:int4', weights_and_activations='pairs', device='a100'
  )
  with pytest.raises(ConfigError, match='int8:int4 is no pair that a100'):
    resolve(config)


def test_the_formats_of_a_device_are_its_pairs():
  config = default_config()
  config.search.update(formats='device', weights_and_activations='pairs')
  resolved = resolve(config)
  assert resolved.search.formats == ('int4,int4:int8,int4:bf16,int8,int8:bf16,bf16')
  assert resolve(resolved).search.formats == resolved.search.formats


@pytest.mark.parametrize(
  ('device', 'pairs'),
  [
    ('xeon_8480', {'int8:bf16': 115}),
    ('tpu_v5e', {'int4:int8': 393, 'int4:bf16': 197, 'int8:bf16': 197}),
    ('tpu_v4', {}),  # where no format is faster than bf16
  ],
)
def test_the_overview_of_a_device_has_its_pairs(device, pairs):
  described = describe_device(device)
  assert described['pairs'] == pairs
  assert described['native']['bf16'] == min(described['native'].values())


def test_reports_know_pairs():
  assert figure_style.family('int4:bf16') == 'integer'
  ordered = ['int4', 'int4:int8', 'int8', 'int4:bf16', 'int8:bf16', 'bf16']
  assert sorted(ordered[::-1], key=tables.option_order) == ordered


def test_the_default_strategy_knows_the_errors_of_pairs(layers):
  space = build_space(layers, ('int4', 'int4:int8', 'int8'), 'pairs')
  errors = _option_errors(space)
  np.testing.assert_allclose(errors[:, 1], (errors[:, 0] + errors[:, 2]) / 2, rtol=1e-6)
  assert (errors[:, 0] == 1).all() and (errors[:, 2] < 0.02).all()


def test_a_search_over_pairs(tmp_path):
  rng = np.random.default_rng(0)
  x = rng.normal(size=(16, 8)).astype(np.float32)
  batch = {'image': x, 'label': np.argmax(x[:, :4], axis=1)}
  result = fliqs_jax.search(
    Network(), [batch], [batch], workdir=tmp_path / 'run', num_steps=40, log_every=10,
    num_samples=4, formats='int4,int8', strategy='sensitivity', device='tpu_v5e',
    target_format='int4:int8', weights_and_activations='pairs',
  )  # fmt: skip
  found = {options.join(**pair) for pair in result.formats.values()}
  assert found <= {'int4', 'int4:int8', 'int8'}
  assert result.cost <= 1.001 * result.target
  assert list(result.content['policy']['body']) == ['int4', 'int4:int8', 'int8']
  assert list(result.content['uniform_costs']) == ['int4', 'int4:int8', 'int8']
  assert tables.chosen(result.content) == {
    path: options.join(**pair) for path, pair in result.formats.items()
  }
