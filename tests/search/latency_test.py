"""Latency tables: measured, written, read back, and refused where they do not fit."""

import copy
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fliqs_jax.errors import ConfigError
from fliqs_jax.layers import products
from fliqs_jax.layers.layer import describe
from fliqs_jax.runs import files, latency_measurement, network
from fliqs_jax.runs import result as results
from fliqs_jax.runs import setup as setup_lib
from fliqs_jax.runs.config import default_config, resolve
from fliqs_jax.search import devices, latency

BATCH_SIZE = 2
FORMATS = ('int4', 'e4m3', 'bf16')


@pytest.fixture(scope='module')
def config():
  config = default_config()
  config.model.update(name='tiny', width=0.0625)
  config.search.formats = ','.join(FORMATS)
  config.search.weights_and_activations = 'separate'
  return resolve(config)


@pytest.fixture(scope='module')
def measured(config):
  return latency_measurement.measure(config, BATCH_SIZE, repeats=1)


@pytest.fixture
def with_table(config, tmp_path):
  """Returns a config whose cost is that of a given table."""

  def make(content, **changes):
    path = tmp_path / 'latency.json'
    results.write_json(path, content)
    searched = copy.deepcopy(config)
    searched.search.update(cost_model='latency_table', latency_table=str(path))
    searched.update_from_flattened_dict(changes)
    return searched

  return make


def _numbered(content):
  """The same table with times that can be told apart: 2, 4, 6 … milliseconds."""
  content, count = copy.deepcopy(content), 0
  for entry in content['entries']:
    for timed in entry['formats'].values():
      count += 1
      timed['ms'] = 2 * count
  return content


def test_every_distinct_layer_is_timed_once_in_every_format(config, measured):
  layers = network.discover_layers(config)
  paths = [path for entry in measured['entries'] for path in entry['layers']]
  assert sorted(paths) == sorted(layer.path for layer in layers)
  keys = {latency.layer_key(layer) for layer in layers}
  assert len(measured['entries']) == len(keys) < len(layers)
  for entry in measured['entries']:
    assert tuple(entry['formats']) == FORMATS
    for timed in entry['formats'].values():
      assert timed['ms'] > 0 and timed['implementation'] == 'emulated'
  assert measured['batch_size'] == BATCH_SIZE and measured['device'] == 'cpu'


def test_native_types_are_timed_where_the_device_has_them(config, monkeypatch):
  # What XLA compiles for a CPU, taken for a device that has int8 and fp8.
  monkeypatch.setattr(devices, 'find_device', lambda kind: devices.DEVICES['h200'])
  narrow = copy.deepcopy(config)
  narrow.search.formats = 'int4,e4m3,e5m2'
  entries = latency_measurement.measure(narrow, BATCH_SIZE, repeats=1)['entries']
  for entry in entries:
    if entry['kind'] == 'dense':
      found = {
        name: timed['implementation'] for name, timed in entry['formats'].items()
      }
      assert found == {
        'int4': 'int8',
        'e4m3': 'float8_e4m3fn',
        'e5m2': 'float8_e5m2',
        'bf16': 'bfloat16',
      }


def test_strides_tell_layers_apart(config):
  (layer, *_) = network.discover_layers(config)
  other = layer._replace(
    arguments=tuple(
      (k, (4, 4) if k == 'window_strides' else v) for k, v in layer.arguments
    )
  )
  assert latency.layer_key(layer) != latency.layer_key(other)
  assert latency.layer_key(layer) == latency.layer_key(layer._replace(path='other'))


def test_a_cost_is_the_sum_of_measured_times(config, measured, with_table):
  table = _numbered(measured)
  searched = with_table(table)
  setup = setup_lib.build(searched, 1)
  assert setup.cost_model.unit == 'ms'
  times = {
    path: {name: timed['ms'] / BATCH_SIZE for name, timed in entry['formats'].items()}
    for entry in table['entries']
    for path in entry['layers']
  }
  sizes = setup.space.valid.sum(axis=1)
  choices = np.random.default_rng(0).integers(sizes, size=(20, len(sizes)))
  choices = choices.astype(np.int32)
  for row in choices:
    expected = [
      max(times[path][name] for name in operands.values())
      for path, operands in setup.space.formats_of(row).items()
    ]
    costs = setup.cost_model.per_layer(setup.space, row)
    np.testing.assert_allclose(costs, expected, rtol=1e-12)
    assert setup.cost_model(setup.space, row) == pytest.approx(sum(expected))
  traced = jax.jit(lambda c: setup.cost_model(setup.space, c))(choices)
  assert traced.dtype == np.float32
  np.testing.assert_allclose(traced, setup.cost_model(setup.space, choices), rtol=1e-6)
  layers = setup.space.layers
  unquantized = setup.cost_model.uniform(layers, 'float32')
  assert unquantized == setup.cost_model.uniform(layers, 'bf16')


def _without_a_layer(content):
  del content['entries'][0]


def _without_a_format(content):
  del content['entries'][0]['formats']['e4m3']


def _of_another_shape(content):
  content['entries'][0]['input_shape'][1] = 99


def _of_other_strides(content):
  content['entries'][0]['arguments']['window_strides'] = [4, 4]


def _with_a_negative_time(content):
  content['entries'][0]['formats']['e4m3']['ms'] = -1.0


def _with_a_time_in_words(content):
  content['entries'][0]['formats']['e4m3']['ms'] = 'fast'


def _without_a_batch_size(content):
  del content['batch_size']


@pytest.mark.parametrize(
  ('damage', 'expected'),
  [
    (_without_a_layer, 'lacks the layer at conv_init'),
    (_without_a_format, 'lacks the format e4m3 for conv_init'),
    (
      _of_another_shape,
      'was measured for input_shape [1, 99, 8, 1] at conv_init, which has input_shape '
      '[1, 8, 8, 1] here',
    ),
    (
      _of_other_strides,
      'for window_strides [4, 4] at conv_init, which has window_strides [2, 2] here',
    ),
    (_with_a_negative_time, 'is no latency table'),
    (_with_a_time_in_words, 'is no latency table'),
    (_without_a_batch_size, "is no latency table (KeyError: 'batch_size')"),
  ],
)
def test_refused_in_one_line(measured, with_table, damage, expected):
  content = copy.deepcopy(measured)
  damage(content)
  with pytest.raises(ConfigError) as error:
    setup_lib.build(with_table(content), 1)
  (problem,) = error.value.problems
  assert expected in problem and 'latency.json' in problem


@pytest.mark.parametrize('text', ['', '[1, 2', '[]', '{"entries": 1, "batch_size": 1}'])
def test_a_file_that_is_no_table(tmp_path, text):
  path = tmp_path / 'latency.json'
  path.write_text(text)
  with pytest.raises(ValueError, match='is no latency table'):
    files.read_latency_table(path)
  with pytest.raises(ValueError, match='cannot read'):
    files.read_latency_table(tmp_path / 'missing.json')


def test_a_table_must_be_named(config):
  searched = copy.deepcopy(config)
  searched.search.cost_model = 'latency_table'
  with pytest.raises(ConfigError, match='search.latency_table'):
    setup_lib.build(searched, 1)


def test_the_file_is_json_that_reads_back(measured, with_table):
  searched = with_table(measured)
  with open(searched.search.latency_table) as file:
    assert json.load(file) == measured


@pytest.mark.parametrize(
  ('kind', 'name'),
  [
    ('TPU v4', 'tpu_v4'),
    ('TPU v5 lite', 'tpu_v5e'),
    ('TPU v5', 'tpu_v5p'),
    ('TPU v6 lite', 'tpu_v6e'),
    ('NVIDIA A100-SXM4-80GB', 'a100'),
    ('NVIDIA H100 80GB HBM3', 'h100'),
    ('NVIDIA H200', 'h200'),
    ('NVIDIA B300 SXM6 AC', 'b300'),
    ('AMD Instinct MI300X', 'mi300x'),
    ('TPU7x', 'tpu_7x'),
    ('TPU8i', 'tpu_8i'),
    ('cpu', None),
    ('TPU v4 lite', None),
  ],
)
def test_devices_by_the_name_that_jax_gives(kind, name):
  assert devices.find_device(kind) is (name and devices.DEVICES[name])


def test_blocks_are_timed_as_scaled_matrix_products(monkeypatch):
  calls = []

  def scaled_matmul(x, w, x_scales, w_scales):  # no CPU has it
    calls.append((x, w, x_scales, w_scales))
    values = (v.astype(jnp.float32) for v in (x, w))
    return jnp.einsum('bmk,bnk->bmn', *values)

  monkeypatch.setattr(jax.nn, 'scaled_matmul', scaled_matmul)
  monkeypatch.setattr(devices, 'find_device', lambda _: devices.DEVICES['b200'])
  x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 64)), jnp.float32)
  w = jnp.asarray(np.random.default_rng(1).normal(size=(64, 5)), jnp.float32)
  product = products.dot_general(x, w, (((2,), (0,)), ((), ())))
  layer = describe('dense', '', product, x, w)
  for name, dtype, size in (
    ('mxfp8_e5m2', jnp.float8_e5m2, 32),
    ('nvfp4', jnp.float4_e2m1fn, 16),
  ):
    implementation, timed = latency_measurement._native(layer, name, x, w)
    assert implementation == jnp.dtype(dtype).name
    shapes = [(a.shape, a.dtype) for a in calls[-1]]
    scale = shapes[2][1]
    assert shapes == [
      ((1, 6, 64), dtype),
      ((1, 5, 64), dtype),
      ((1, 6, 64 // size), scale),
      ((1, 5, 64 // size), scale),
    ]
    rounded = (np.asarray(v.astype(dtype), np.float32) for v in (x, w))
    expected = np.einsum('btk,kn->btn', *rounded).reshape(1, 6, 5)
    np.testing.assert_allclose(timed(), expected, rtol=1e-5, atol=1e-5)
  # What the device has no blocks of, or has not whole, is emulated.
  assert latency_measurement._native(layer, 'int4_b32', x, w) is None
  short = describe('dense', '', product, x[..., :40], w[:40])
  assert latency_measurement._native(short, 'nvfp4', x[..., :40], w[:40]) is None


def test_the_summary_names_formats_without_an_operation_of_their_own():
  timed = lambda **by_name: {  # noqa: E731
    'formats': {name: {'implementation': how} for name, how in by_name.items()}
  }
  content = {
    'device': 'NVIDIA B200',
    'entries': [
      timed(nvfp4='float4_e2m1fn', int4='emulated', bf16='bfloat16'),
      timed(nvfp4='emulated', int4='emulated', bf16='bfloat16'),
    ],
  }
  assert latency_measurement.summary(content) == (
    '2 distinct layers on NVIDIA B200 (bfloat16, emulated, float4_e2m1fn; emulated '
    'for lack of an operation: int4)'
  )
  content['entries'] = content['entries'][:1]
  content['entries'][0]['formats'].pop('int4')
  assert latency_measurement.summary(content) == (
    '1 distinct layers on NVIDIA B200 (bfloat16, float4_e2m1fn)'
  )
