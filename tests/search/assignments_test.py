"""Formats given by hand: which layer gets which, and what is refused."""

import json

import numpy as np
import pytest

from fliqs_jax.errors import ConfigError
from fliqs_jax.runs import files, network
from fliqs_jax.runs import setup as setup_lib
from fliqs_jax.runs.config import resolve
from fliqs_jax.search import assignments

INT8 = {'weights': 'int8', 'activations': 'int8'}
MIXED = {'weights': 'int3', 'activations': 'int4'}


@pytest.fixture(scope='module')
def layers(tiny_config):
  return network.discover_layers(resolve(tiny_config))


def expand(content, layers):
  return assignments.expand(assignments.parse(content, 'formats.json'), layers)


def test_own_path_wins_then_the_first_regex_in_the_file(layers):
  content = {
    r'stage\d_.*': 'int4',
    '.*': MIXED,
    'stage1_block1/conv1': 'int8',  # after the regexes that match it, and yet it wins
    'conv_.*': 'int2',  # never reached
  }
  formats = expand(content, layers)
  assert list(formats) == [layer.path for layer in layers]
  for path, assigned in formats.items():
    if path == 'stage1_block1/conv1':
      assert assigned == INT8
    elif path.startswith('stage'):
      assert assigned == {'weights': 'int4', 'activations': 'int4'}
    else:
      assert assigned == MIXED


def test_a_regex_matches_whole_paths(layers):
  with pytest.raises(ValueError, match='stage1') as error:
    expand({'stage1': 'int8', '.*': 'int4'}, layers)
  assert str(error.value).count('\n') == 0


def test_layers_without_formats_and_unused_keys_are_named(layers):
  with pytest.raises(ValueError) as error:
    expand({'conv_int': 'int8', 'clasifier': 'int8', '(': 'int8'}, layers)
  lines = str(error.value).splitlines()
  for fragment in (
    'formats of "(": no regular expression',
    "the nearest is 'conv_init'",
    "the nearest is 'classifier'",
    f'{len(layers)} layer(s) without formats: conv_init',
  ):
    assert sum(fragment in line for line in lines) == 1, lines
  assert len(lines) == 4


def test_formats_of_another_network_take_few_lines(layers):
  content = {f'features_{i}': 'int8' for i in range(100)}
  with pytest.raises(ValueError, match='97 more keys match no layer') as error:
    expand(content, layers)
  assert len(str(error.value).splitlines()) == 5


def test_file_costs_what_its_layers_cost(tiny_config, layers, tmp_path):
  path = tmp_path / 'formats.json'
  path.write_text(json.dumps({'conv_init': 'int8', '.*': MIXED}))
  assignment = files.read_formats(str(path))
  setup = setup_lib.build(resolve(tiny_config), 1, assignment)
  expected = sum(
    layer.macs * (64 if layer.path == 'conv_init' else 12) for layer in layers
  )
  cost = setup.cost_model(setup.space, np.zeros(0, np.int32))
  assert cost == pytest.approx(expected / 1e9)


def test_a_result_is_read_by_its_formats(tmp_path):
  path = tmp_path / 'search_result.json'
  path.write_text(json.dumps({'model': 'tiny', 'formats': {'conv_init': INT8}}))
  assert files.read_formats(str(path)) == {'conv_init': INT8}
  assert files.read_formats('e4m3') == 'e4m3'
  with pytest.raises(ValueError, match="the nearest is 'int8'"):
    files.read_formats('int88')


@pytest.mark.parametrize(
  'content, expected',
  [
    (b'', 'not JSON'),
    (b'{"a": "int4"', 'not JSON, or cut off'),
    (b'\xff\xfe', 'not a text file'),
    (b'[' * 100_000, 'not JSON'),
    (b'1' * 5_000, 'not JSON'),
    (b'[1, 2]', 'holds [1, 2]'),
    (b'null', 'holds null'),
    (b'{}', 'holds no formats'),
    (b'{"formats": 3}', 'holds no formats'),
    (b'{"a": "int4", "a": "int8"}', 'the key "a" is there twice'),
    (b'{"a": "int44"}', "the nearest is 'int4'"),
    (b'{"a": 4}', 'layer "a": expected a format name'),
    (b'{"a": {"weights": "int4"}}', 'layer "a": expected a format name'),
    (b'{"a": {"weights": 4, "activations": null}}', 'expected the name of a format'),
    (b'{"a\\nb": [1]}', 'layer "a\\nb"'),
    (b' ' * (2**24 + 1), 'larger than 16 MiB'),
  ],
)
def test_unusable_files_are_refused_in_one_line(tmp_path, content, expected):
  path = tmp_path / 'formats.json'
  path.write_bytes(content)
  with pytest.raises(ValueError) as error:
    files.read_formats(str(path))
  assert expected in str(error.value) and '\n' not in str(error.value)


def test_every_bad_layer_is_named():
  with pytest.raises(ValueError) as error:
    assignments.parse({'a': 1, 'b': 'int4', 'c': 'e9m9'}, 'formats.json')
  lines = str(error.value).splitlines()
  assert ['layer "a"' in lines[0], 'layer "c"' in lines[1]] == [True, True]
  assert len(lines) == 2


def test_folders_and_missing_files(tmp_path):
  for path in (tmp_path, tmp_path / 'none.json'):
    with pytest.raises(ValueError, match='cannot read .*: '):
      files.read_formats(str(path))


def test_build_reports_them_with_the_config(tiny_config):
  config = resolve(tiny_config)
  config.seed = -1
  with pytest.raises(ConfigError) as error:
    setup_lib.build(config, 1, {'classifer': INT8})
  assert any('seed=-1' in line for line in error.value.problems)
  assert any("nearest is 'classifier'" in line for line in error.value.problems)
