"""Whole runs that search the architecture: what they leave, and what is made of it."""

import json

import jax
import numpy as np
import pytest

import fliqs_jax
from fliqs_jax import models
from fliqs_jax.errors import ConfigError
from fliqs_jax.layers import architecture
from fliqs_jax.reporting import overview, terminal
from fliqs_jax.runs import builders, loop, network
from fliqs_jax.runs import result as results
from fliqs_jax.runs import setup as setup_lib
from fliqs_jax.runs.config import resolve
from fliqs_jax.search import budget
from fliqs_jax.search import space as search_space


@pytest.fixture(scope='module')
def joint_config(tiny_config):
  """A tiny residual network of two blocks, of which the second may be absent."""
  config = tiny_config.copy_and_resolve_references()
  with config.unlocked():
    config.model.update(stage_sizes=(2,), width=0.125, multipliers=(0.5, 1.0))
  config.search.decide = 'both'
  return config


@pytest.fixture
def run(joint_config, tmp_path):
  def run(name, **changes):
    config = joint_config.copy_and_resolve_references()
    config.update_from_flattened_dict(changes)
    return loop.run(config, tmp_path / name)

  return run


@pytest.fixture(scope='module')
def found(joint_config, tmp_path_factory):
  """The folder of a finished search and its result."""
  workdir = tmp_path_factory.mktemp('joint') / 'run'
  return workdir, loop.run(joint_config, workdir)


def test_search_finds_architecture_and_formats(found, joint_config):
  workdir, result = found
  architecture = result['architecture']
  assert set(architecture) == {'stage1/width', 'stage1_block2/present'}
  for name, size in architecture.items():
    assert str(size) in result['policy'][name]
  assert result['cost'] <= result['target']
  # The target is a multiple of the standard network's cost.
  standard = network.discover_layers(joint_config)
  cost_model = builders.build_cost_model(joint_config)
  assert result['target'] == cost_model.uniform(standard, 'int3')
  setup = setup_lib.build(resolve(joint_config), jax.device_count())
  policy = [list(row.values()) for row in result['policy'].values()]
  likeliest = budget.most_likely_within(
    setup.space,
    setup.cost_model,
    np.log([row + [1.0] * (4 - len(row)) for row in policy]),
    setup.target,
  )
  assert setup.space.architecture_of(likeliest) == architecture
  assert setup.space.formats_of(likeliest) == result['formats']


def test_small_network_evaluates_as_the_masked_supernet_did(found, run):
  workdir, result = found
  evaluated = run('eval', mode='eval', checkpoint=str(workdir))
  assert evaluated['eval']['accuracy'] == result['eval']['accuracy']
  assert evaluated['eval']['loss'] == pytest.approx(result['eval']['loss'], rel=1e-5)
  assert evaluated['architecture'] == result['architecture']
  assert evaluated['cost'] == pytest.approx(result['cost'], rel=1e-12)


def test_found_network_is_trained_and_evaluated_again(found, run, tmp_path):
  workdir, result = found
  path = str(workdir / results.RESULT_FILE)
  trained = run('trained', mode='train', formats=path)
  for field in ('architecture', 'formats'):
    assert trained[field] == result[field]
  assert trained['cost'] == pytest.approx(result['cost'], rel=1e-12)
  source = {'mode': 'eval', 'checkpoint': str(tmp_path / 'trained')}
  evaluated = run('again', **source)
  assert evaluated['eval']['accuracy'] == trained['eval']['accuracy']
  # A network that was trained by itself is no other network.
  other = json.loads((workdir / results.RESULT_FILE).read_text())
  other['architecture']['stage1_block2/present'] ^= 1  # whose formats are lacking then
  (tmp_path / 'other.json').write_text(json.dumps(other))
  with pytest.raises(ConfigError) as error:
    run('other', **source, architecture=str(tmp_path / 'other.json'))
  (line,) = error.value.problems
  assert 'checkpoint of another architecture' in line


def test_overview_and_result_show_the_architecture(found, joint_config, capsys):
  workdir, result = found
  overviewed = overview.describe(
    resolve(joint_config), result['formats'], 'found', result['architecture']
  )
  assert overviewed.total == pytest.approx(result['cost'], rel=1e-12)
  assert overviewed.architecture == result['architecture']
  assert [layer['name'] for layer in overviewed.layers] == list(result['formats'])
  print(overviewed)
  terminal.print_result(result, str(workdir))
  shown = capsys.readouterr().out
  for name, size in result['architecture'].items():
    rows = [line.split() for line in shown.splitlines() if name in line.split()]
    probability = result['policy'][name][str(size)]
    assert rows == [[name, str(size), 'fixed'], [name, str(size), f'{probability:.2f}']]


def test_one_of_both_is_searched_alone(joint_config):
  def decisions(decide, formats, scale, architecture=()):
    config = joint_config.copy_and_resolve_references()
    config.search.update(decide=decide, formats=formats, target_scale=scale)
    setup = setup_lib.build(resolve(config), 1, None, None, dict(architecture))
    return setup, [decision.name for decision in setup.space.decisions]

  sizes = ['stage1/width', 'stage1_block2/present']
  setup, names = decisions('architecture', 'int4', 1.0)
  assert names == sizes
  assert {f['weights'] for f in setup.space.formats_of(np.zeros(2, int)).values()} == {
    'int4'
  }
  setup, names = decisions('formats', 'int3,int4', 1.5)
  assert names == [layer.path for layer in setup.space.layers]
  assert setup.space.layers == setup.standard_layers
  found = {'stage1/width': 4, 'stage1_block2/present': 0}
  smaller, names = decisions('formats', 'int3,int4', 0.2, found.items())
  assert not any(name.startswith('stage1_block2') for name in names)
  assert smaller.architecture == found
  # The target still is a multiple of the standard network's cost.
  assert smaller.target == pytest.approx(setup.target * 0.2 / 1.5, rel=1e-12)
  with pytest.raises(ConfigError, match='expected one format in search.formats'):
    decisions('architecture', 'int3,int4', 1.0)


def test_bad_architectures_end_with_one_line(found, run, tmp_path):
  def problem(architecture, **changes):
    path = tmp_path / 'architecture.json'
    path.write_text(architecture)
    changes = {'mode': 'train', 'formats': 'int4', **changes}
    with pytest.raises(ConfigError) as error:
      run('bad', architecture=str(path), **changes)
    assert not (tmp_path / 'bad').exists()
    (line,) = error.value.problems
    return line

  good = found[1]['architecture']
  assert 'not JSON' in problem('{')
  assert 'holds no "architecture"' in problem('{"formats": {}}')
  other = {'architecture': {**good, 'stem/width': 8}}
  assert "'stem/width'" in problem(json.dumps(other))
  outside = {'architecture': {**good, 'stage1/width': 5}}
  assert 'expected one of 4, 8' in problem(json.dumps(outside))
  searched = problem(json.dumps({'architecture': good}), mode='search', formats='')
  assert 'expected search.decide=formats' in searched
  # Also in the file of the formats, where hand-written ones have none.
  damaged = found[1] | {'architecture': {**good, 'stage1/width': '4'}}
  (tmp_path / 'damaged.json').write_text(json.dumps(damaged))
  with pytest.raises(ConfigError) as error:
    run('bad', mode='train', formats=str(tmp_path / 'damaged.json'))
  (line,) = error.value.problems
  assert 'holds no "architecture" of integers' in line
  with pytest.raises(ConfigError, match='and all architectures; change'):
    run('bad', **{'search.target_scale': 0.001})


def test_python_interface_decides_formats_alone():
  model = models.create_model(
    'resnet18', 10, width=0.125, small_images=True, choose=architecture.searched
  )
  batch = {'image': np.zeros((4, 8, 8, 1), np.float32), 'label': np.zeros(4, np.int32)}
  with pytest.raises(ConfigError, match='the architecture of ResNet is left open'):
    fliqs_jax.search(model, [batch], [batch], num_steps=2)


def test_layers_outside_the_architecture_have_no_formats(found, joint_config):
  _, result = found
  choose = network.choose_architecture(joint_config, result['architecture'])
  layers = network.discover_layers(joint_config, choose)
  search_space.check_layers(layers, result['formats'])
