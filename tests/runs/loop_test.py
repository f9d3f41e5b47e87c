"""Whole runs: what they leave, how they resume, what they accept."""

import inspect
import json
import types

from conftest import TINY_LAYERS
from etils import epath
import jax
import ml_collections
import numpy as np
import pytest
import tensorflow as tf

from fliqs_jax import main
from fliqs_jax.errors import ConfigError
from fliqs_jax.reporting import terminal
from fliqs_jax.runs import (
  again,
  builders,
  evaluation,
  files,
  loop,
  network,
  preparation,
)
from fliqs_jax.runs import result as results
from fliqs_jax.runs import setup as setup_lib
from fliqs_jax.runs import workdir as workdirs
from fliqs_jax.runs.config import resolve
from fliqs_jax.search import budget, rewards
from fliqs_jax.search import space as search_space
from fliqs_jax.training import sharding

RESULT_FIELDS = {
    'model', 'dataset', 'cost_model', 'cost_unit', 'target', 'cost', 'caps', 'seed',
    'steps', 'formats', 'layers', 'architecture', 'eval', 'uniform_costs', 'policy',
    'versions', 'config',
}  # fmt: skip


class Interrupted(Exception):
  """Stands for a run that is killed."""


def read_history(workdir):
  lines = (workdir / workdirs.HISTORY_FILE).read_text().splitlines()
  return [json.loads(line) for line in lines]


@pytest.fixture(scope='module')
def finished(tiny_config, tmp_path_factory):
  """The folder of a finished search, its result, and how often it traced its step."""
  traces = []

  def counted(*args, **kwargs):
    traces.append(1)
    return rewards.absolute(*args, **kwargs)

  workdir = tmp_path_factory.mktemp('finished') / 'run'
  reward = rewards.REWARDS['absolute']._replace(function=counted)
  with pytest.MonkeyPatch.context() as monkeypatch:
    monkeypatch.setitem(rewards.REWARDS, 'absolute', reward)
    result = loop.run(tiny_config, workdir)
  return workdir, result, len(traces)


@pytest.fixture
def run(tiny_config, tmp_path):
  """Runs the tiny search with some fields changed, in `tmp_path / name`."""

  def run(name, **changes):
    config = tiny_config.copy_and_resolve_references()
    config.update_from_flattened_dict(changes)
    return loop.run(config, tmp_path / name)

  return run


def test_search_leaves_its_files(finished):
  workdir, result, _ = finished
  assert json.loads((workdir / 'search_result.json').read_text()) == result
  assert set(result) == RESULT_FIELDS
  assert set(result['eval']) == {'accuracy', 'loss', 'num_examples'}
  assert result['eval']['num_examples'] == 360
  assert result['cost'] <= result['target']
  assert result['target'] == result['uniform_costs']['int3']
  assert len(result['formats']) == TINY_LAYERS and result['architecture'] == {}
  for layer, formats in result['formats'].items():
    assert formats['weights'] == formats['activations'] in result['uniform_costs']
    assert sum(result['policy'][layer].values()) == pytest.approx(1, abs=1e-5)

  history = read_history(workdir)
  # Every third step, and before every checkpoint.
  assert [line['step'] for line in history] == [3, 4, 6, 8, 9, 12]
  assert {'loss', 'accuracy', 'reward', 'cost', 'entropy', 'policy'} <= set(history[0])
  assert json.loads((workdir / 'config.json').read_text()) == result['config']
  assert list(workdir.glob('events.out.tfevents.*'))
  assert (workdir / 'checkpoints' / '12').is_dir()


def test_one_trace_in_a_whole_run(finished):
  # One program for every choice, before and after the delays and the commitment.
  assert finished[2] == 1


def test_finished_run_is_left_as_it_is(finished, tiny_config):
  workdir, result, _ = finished
  before = (workdir / 'search_result.json').stat().st_mtime_ns
  assert loop.run(tiny_config, workdir) == result
  assert (workdir / 'search_result.json').stat().st_mtime_ns == before


@pytest.mark.parametrize('killed_at', [6, 12])
def test_interrupted_run_ends_like_an_uninterrupted_one(
  finished, run, tmp_path, monkeypatch, killed_at
):
  workdir, result, _ = finished
  write = workdirs.History.write

  def interrupt(self, step, *args):
    if step == killed_at:
      raise Interrupted
    write(self, step, *args)

  monkeypatch.setattr(workdirs.History, 'write', interrupt)
  with pytest.raises(Interrupted):
    run('killed')
  assert not (tmp_path / 'killed' / 'search_result.json').exists()
  monkeypatch.undo()
  assert run('killed') == result
  assert read_history(tmp_path / 'killed') == read_history(workdir)


def test_other_config_in_the_workdir_is_refused_by_field(finished, tiny_config):
  config = tiny_config.copy_and_resolve_references()
  config.seed = 1
  with pytest.raises(ConfigError, match=r'another config: seed \(0 there, 1 here\)'):
    loop.run(config, finished[0])


def test_train_with_the_found_formats(finished, run, tmp_path):
  workdir, found, _ = finished
  path = tmp_path / 'search_result.json'
  path.write_text((workdir / 'search_result.json').read_text())
  changes = {'mode': 'train', 'formats': str(path), 'eval_every': 4}
  trained = run('trained', **changes)
  assert set(trained) == RESULT_FIELDS
  assert trained['formats'] == found['formats']
  assert trained['cost'] == found['cost']
  assert trained['policy'] == {} and trained['target'] is None

  # Evaluated meanwhile, but for the evaluation at the end, which is the result's.
  evaluated = {row['step'] for row in read_history(tmp_path / 'trained')
               if 'eval_accuracy' in row}  # fmt: skip
  assert evaluated == {4, 8}
  (events,) = (tmp_path / 'trained').glob('events.out.tfevents.*')
  tags = {
    value.tag
    for event in tf.compat.v1.train.summary_iterator(str(events))
    for value in event.summary.value
  }
  assert tags >= {'train/loss', 'eval/loss', 'eval/accuracy', 'train/steps_per_second'}

  # The run is whole without the file that it was started from, also where it is moved.
  path.unlink()
  (tmp_path / 'trained').rename(tmp_path / 'moved')
  config = again.get_config(str(tmp_path / 'moved'))
  assert files.read_formats(config.formats) == found['formats']


def test_eval_of_another_run(finished, run, tmp_path):
  workdir, found, _ = finished
  source = {'mode': 'eval', 'checkpoint': str(workdir)}
  own = run('own', **source)
  assert own['eval']['accuracy'] == found['eval']['accuracy']
  # Formats known at compile time may be folded in another order of operations.
  assert own['eval']['loss'] == pytest.approx(found['eval']['loss'], rel=1e-6)
  assert (tmp_path / 'own' / 'eval_result.json').exists()
  others = run('others', **source, formats='int8')
  assert others['cost'] == found['uniform_costs']['int8']
  assert others['eval']['loss'] != pytest.approx(found['eval']['loss'], rel=1e-3)


def test_float_training(finished, run):
  unquantized = run('float', **{'mode': 'train', 'formats': 'float32'})
  assert {f['weights'] for f in unquantized['formats'].values()} == {'float32'}
  # A layer that is not quantized counts 16 bits: four times the cost of int8.
  assert unquantized['cost'] == 4 * finished[1]['uniform_costs']['int8']


def test_held_out_reward_separate_decisions_and_pins(run, capsys):
  result = run(
    'held_out',
    **{
      'reward.split': 'validation',
      'reward.quality': 'minus_loss',
      'input.train_split': 'train[:90%]',
      'input.reward_split': 'train[90%:]',
      'search.weights_and_activations': 'separate',
      'search.pins': (('conv_init', 'int8'),),
      'search.target_scale': 2.0,
      'search.groups': ('(stage1_block1)/.*',),
      'controller.baseline': 'moving',
    },
  )
  # Two decisions each of the block and of what is outside it, less the stem.
  decisions = {name.rpartition(':')[0] for name in result['policy']}
  assert len(result['policy']) == 2 * len(decisions)
  assert decisions == {'stage1_block1', 'classifier'}
  assert result['formats']['conv_init'] == {'weights': 'int8', 'activations': 'int8'}
  assert result['cost'] <= result['target']

  decided = {path: layer['decisions'] for path, layer in result['layers'].items()}
  assert decided['conv_init'] == {'weights': None, 'activations': None}
  assert decided['stage1_block1/conv1'] == {
    'weights': 'stage1_block1:weights', 'activations': 'stage1_block1:activations'
  }  # fmt: skip

  terminal.print_result(result, 'DIR')
  rows = [line.split() for line in capsys.readouterr().out.splitlines()]
  (stem,) = (row for row in rows if row[:1] == ['conv_init'])
  assert stem[4:7] == ['int8', 'int8', 'pinned']
  (conv1,) = (row for row in rows if row[:1] == ['stage1_block1/conv1'])
  formats = result['formats']['stage1_block1/conv1']
  assert conv1[4:6] == [formats['weights'], formats['activations']]
  probability = result['policy']['stage1_block1:weights'][formats['weights']]
  assert conv1[6] == f'{probability:.2f}'


def test_without_a_hard_budget_the_policy_decides(run):
  result = run('soft', **{'search.hard_budget': False})
  for layer, formats in result['formats'].items():
    policy = result['policy'][layer]
    assert policy[formats['weights']] == max(policy.values())


def test_commitment_is_the_likeliest_choice_within_the_target(finished, tiny_config):
  result = finished[1]
  setup = setup_lib.build(resolve(tiny_config), jax.device_count())
  policy = np.array([list(p.values()) for p in result['policy'].values()])
  expected = budget.most_likely_within(
    setup.space, setup.cost_model, np.log(policy), setup.target
  )
  np.testing.assert_array_equal(setup.space.choices_of(result['formats']), expected)


def test_the_final_formats_keep_a_cap_on_a_second_cost(run, tmp_path, capsys):
  changes = {
    'search.cap_cost_model': 'model_size',
    'search.cap_format': 'int3',
    'search.cap_scale': 1.1,
  }
  result = run('capped', **changes)
  assert set(result) == RESULT_FIELDS and result['cost'] <= result['target']
  assert result['config']['search']['cap_scale'] == 1.1
  config = ml_collections.ConfigDict(result['config'])
  layers = network.discover_layers(config)
  cost_model = builders.build_cost_model(config)
  ((size, limit),) = builders.search_caps(config, cost_model, layers)
  space = search_space.fixed_space(layers, result['formats'])
  assert size(space, np.zeros(0, np.int32)) <= limit
  assert limit == pytest.approx(1.1 * size.uniform(layers, 'int3'))
  (cap,) = result['caps']
  assert cap == {
      'cost_model': 'model_size', 'cost_unit': size.unit, 'limit': limit,
      'cost': float(size(space, np.zeros(0, np.int32))),
  }  # fmt: skip
  # What is printed is the result's.
  changed = cap | {'cost': 5.0, 'limit': 7.5}
  terminal.print_result(result | {'caps': [changed]}, str(tmp_path))
  assert 'of the cap 7.5' in capsys.readouterr().out


def test_evaluations_of_a_run_compile_once(tiny_config, tmp_path):
  setup = preparation.prepare(resolve(tiny_config), epath.Path(tmp_path))
  traces, evaluated = [], setup.task.evaluation

  def counted(*args):
    traces.append(1)
    return evaluated(*args)

  setup = setup._replace(task=setup.task._replace(evaluation=counted))
  mesh = sharding.make_mesh(setup.num_samples)
  state = evaluation.initial_state(setup, mesh, 0)
  evaluate = evaluation.make_evaluate(setup, mesh)
  lowest = np.zeros(len(setup.space.decisions), np.int32)
  results = [evaluate(state, choices) for choices in (lowest, lowest + 3, lowest)]
  assert results[0] == results[2] != results[1]
  assert len(traces) == 1


def test_meanwhile_the_best_formats_so_far_are_evaluated(tiny_config, tmp_path):
  config = tiny_config.copy_and_resolve_references()
  config.search.strategy = 'actor_critic'
  setup = preparation.prepare(resolve(config), epath.Path(tmp_path))
  state = evaluation.initial_state(setup, sharding.make_mesh(setup.num_samples), 0)
  assert (setup.controller.final_choices(state.controller) < 0).all()  # none yet
  evaluated = []

  def evaluate(state, choices):
    evaluated.append(choices)
    return {'accuracy': 0.5, 'num_examples': 9}

  # Before the commitment those within the target, after it what was committed to.
  assert loop._evaluated_meanwhile(setup, state, evaluate) == {'eval_accuracy': 0.5}
  cost = setup.cost_model(setup.space, evaluated[0])
  assert (evaluated[0] >= 0).all() and cost <= setup.target
  lowest = np.zeros_like(evaluated[0])
  controller = setup.controller.commit(state.controller, lowest)
  committed = state.replace(controller=controller)
  loop._evaluated_meanwhile(setup, committed, evaluate)
  np.testing.assert_array_equal(evaluated[1], lowest)


def test_non_finite_loss_names_its_step(run):
  with pytest.raises(FloatingPointError, match=r'at step \d+, sample .*, lower'):
    run('diverging', **{'optimizer.learning_rate': 1e30})


def test_all_problems_come_together_and_nothing_is_written(run, tmp_path):
  with pytest.raises(ConfigError) as error:
    run('bad', **{
        'seed': -1,
        'dataset': 'digit',
        'search.formats': 'int9',
        'search.num_samples': 3,
        'model.name': 'resnet17',
    })  # fmt: skip
  problems = error.value.problems
  for fragment in ("'digits'", "'int8'", 'seed=-1', 'batch_size=32', "'resnet18'"):
    assert sum(fragment in problem for problem in problems) == 1, (fragment, problems)
  assert not (tmp_path / 'bad').exists()


def test_unreachable_target_states_the_range(run):
  with pytest.raises(
    ConfigError, match=r'expected one from [\d.e-]+ to [\d.e-]+ GBOPs'
  ) as error:
    run('bad', **{'search.target_scale': 0.01})
  # All in int2 or all in int8, beside the uniform int3 model: (2/3)² and (8/3)².
  assert 'target_scale to one from 0.4445 to 7.1111 (' in str(error.value)


def test_unusable_formats_file(run, tmp_path):
  path = tmp_path / 'formats.json'
  path.write_text('{"formats": {"conv_init"')
  with pytest.raises(ConfigError, match='not JSON, or cut off') as error:
    run('bad', **{'mode': 'train', 'formats': str(path)})
  assert len(error.value.problems) == 1
  path.write_text('{"conv_init": "int8"}')
  with pytest.raises(ConfigError, match=f'{TINY_LAYERS - 1} layer.s. without formats'):
    run('bad', **{'mode': 'train', 'formats': str(path)})
  with pytest.raises(ConfigError, match='no effect on a search'):
    run('bad', formats=str(path))
  assert not (tmp_path / 'bad').exists()


@pytest.mark.parametrize('name', ['lr=[1,2]', 'a\\b'])
def test_a_workdir_that_orbax_cannot_read_is_refused_at_once(run, tmp_path, name):
  with pytest.raises(ConfigError, match='expected a path without'):
    run(name)
  assert not list(tmp_path.iterdir())


def test_workdir_that_is_a_file(run, tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(ConfigError, match='is a file'):
    run('file')


def test_eval_needs_a_run_of_the_same_network(finished, run):
  with pytest.raises(ConfigError, match='holds no run'):
    run('nothing', mode='eval')
  with pytest.raises(ConfigError, match='holds a checkpoint of model'):
    run('other', **{
        'mode': 'eval', 'checkpoint': str(finished[0]), 'model.width': 0.125
    })  # fmt: skip


def test_result_is_written_whole_or_not_at_all(tmp_path):
  path = epath.Path(tmp_path) / 'search_result.json'
  results.write_json(path, {'formats': {}})
  with pytest.raises(TypeError):
    results.write_json(path, {'formats': object()})
  assert json.loads(path.read_text()) == {'formats': {}}


def test_few_calls_lead_from_the_command_to_the_step(
  tiny_config, tmp_path, monkeypatch
):
  calls = []

  def step(state, batch):
    for call in inspect.stack():
      if call.frame.f_globals['__name__'].startswith('fliqs_jax.'):
        calls.append(call.function)
    raise Interrupted

  monkeypatch.setattr(loop, 'make_step', lambda *args: step)
  monkeypatch.setattr(main, '_CONFIG', types.SimpleNamespace(value=tiny_config))
  monkeypatch.setattr(main, '_WORKDIR', types.SimpleNamespace(value=tmp_path))
  flag = types.SimpleNamespace(value=None)
  for name in ('COORDINATOR', 'NUM_PROCESSES', 'PROCESS_ID', 'DISTRIBUTED'):
    monkeypatch.setattr(main, f'_{name}', flag)
  monkeypatch.setattr(main, '_ALLOW_CONFIG_CHANGE', flag)
  with pytest.raises(Interrupted):
    main.main([])
  assert calls[-1] == 'main' and len(calls) == 5, calls
