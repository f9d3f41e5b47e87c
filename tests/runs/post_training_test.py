"""Searches without training: what they measure, find, leave and refuse."""

import itertools
import json
import re

from etils import epath
from flax import nnx, traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fliqs_jax
from fliqs_jax.errors import ConfigError
from fliqs_jax.numerics.formats import get_format
from fliqs_jax.reporting import terminal
from fliqs_jax.reporting.page import write_report
from fliqs_jax.runs import evaluation, loop
from fliqs_jax.runs.config import resolve
from fliqs_jax.training import post_training, sharding

FORMATS = ('int2', 'int4', 'int8')
RNG = np.random.default_rng(0)
BATCHES = [
  {
    'image': RNG.normal(size=(8, 6)).astype(np.float32),
    'label': RNG.integers(4, size=8),
  }
  for _ in range(3)
]


class Network(nnx.Module):
  """Three layers, of different sizes, and dropout."""

  def __init__(self, rngs):
    self.first = nnx.Linear(6, 16, rngs=rngs)
    self.middle = nnx.Linear(16, 8, rngs=rngs)
    self.dropout = nnx.Dropout(0.5, rngs=rngs)
    self.last = nnx.Linear(8, 4, rngs=rngs)

  def __call__(self, x):
    return self.last(self.dropout(nnx.relu(self.middle(nnx.relu(self.first(x))))))


def search(model=None, **fields):
  arguments = {
    'strategy': 'sensitivity', 'num_steps': 0, 'formats': FORMATS,
    'target_format': 'int4', 'statistics_batches': 3, 'refinement_rounds': 0, **fields,
  }  # fmt: skip
  model = model or Network(nnx.Rngs(0))
  return fliqs_jax.search(model, BATCHES, BATCHES, **arguments)


@pytest.fixture(scope='module')
def found(tmp_path_factory):
  """The result of a search of an NNX module's own weights, and its folder."""
  folder = tmp_path_factory.mktemp('found') / 'run'
  sizes = []
  make = post_training.make_quality_step

  def counted(*args):
    step = make(*args)

    def measure(*arguments):
      measured = step(*arguments)
      sizes.append(step._cache_size())
      return measured

    return measure

  with pytest.MonkeyPatch.context() as monkeypatch:
    monkeypatch.setattr(post_training, 'make_quality_step', counted)
    result = search(workdir=folder)
  return result, folder, sizes


def test_one_program_measures_all_formats(found):
  _, _, sizes = found
  # Nine changes and the reference, the program's choices and the two uniform models
  # within the budget with the reference, then the network before, on each batch.
  assert len(sizes) == 3 * (10 + 4 + 1) and set(sizes) == {1}


def test_sensitivities_are_what_an_evaluation_under_these_formats_loses(found):
  result, folder, _ = found
  sensitivities = result.content['sensitivities']
  assert {d: tuple(s) for d, s in sensitivities.items()} == dict.fromkeys(
    ('first', 'middle', 'last'), FORMATS
  )

  def loss(**formats):
    formats = {**formats, '.*': 'float32'}
    model = Network(nnx.Rngs(1))  # whose own weights count for nothing
    return fliqs_jax.evaluate(model, BATCHES, folder, formats=formats)['loss']

  for layer, name in (('first', 'int2'), ('last', 'int4')):
    lost = loss(**{layer: name}) - loss()
    assert sensitivities[layer][name] == pytest.approx(lost, rel=1e-4, abs=1e-6)
  record = result.content['post_training']
  assert -loss() == pytest.approx(record['unquantized'], rel=1e-5)
  assert -result.eval['loss'] == pytest.approx(record['measured'], rel=1e-5)
  assert record['unquantized_eval']['loss'] == pytest.approx(loss(), rel=1e-5)
  assert record['examples'] == 24


def test_statistics_of_activations_are_means_over_batches_without_dropout(found):
  result, _, _ = found
  images = np.stack([batch['image'] for batch in BATCHES])
  weights = result.variables['params']
  hidden = np.maximum(images @ weights['first']['kernel'] + weights['first']['bias'], 0)
  before_last = hidden @ weights['middle']['kernel'] + weights['middle']['bias']
  for layer, inputs in (
    ('first', images), ('middle', hidden), ('last', np.maximum(before_last, 0)),
  ):  # fmt: skip
    (statistics,) = result.variables['quant_stats'][layer].values()
    mean_square, absmax = (np.mean(v) for v in (
      np.square(inputs).mean((1, 2)), np.abs(inputs).max((1, 2))
    ))  # fmt: skip
    np.testing.assert_allclose(statistics['mean_square'], mean_square, 1e-5)
    np.testing.assert_allclose(statistics['absmax'], absmax, 1e-5)


def test_no_assignment_within_the_budget_loses_less(found):
  result, _, _ = found
  sensitivities = result.content['sensitivities']
  macs = {'first': 96, 'middle': 128, 'last': 32}
  bits = {'int2': 2, 'int4': 4, 'int8': 8}

  def cost(assignment):
    return sum(macs[layer] * bits[name] ** 2 for layer, name in assignment.items())

  def lost(assignment):
    return sum(sensitivities[layer][name] for layer, name in assignment.items())

  every = [dict(zip(macs, names)) for names in itertools.product(FORMATS, repeat=3)]
  least = min(lost(a) for a in every if cost(a) <= 16 * sum(macs.values()))
  chosen = {layer: formats['weights'] for layer, formats in result.formats.items()}
  assert lost(chosen) == pytest.approx(least)
  assert (
    result.cost == pytest.approx(1e-9 * cost(chosen)) and result.cost <= result.target
  )
  record = result.content['post_training']
  assert record['predicted'] == pytest.approx(record['unquantized'] - least)


def test_swaps_measure_no_worse_within_the_budget(found):
  added, swapped = found[0], search(refinement_rounds=3)
  assert swapped.cost <= swapped.target
  records = [run.content['post_training'] for run in (added, swapped)]
  assert records[1]['measured'] >= records[0]['measured']
  assert -swapped.eval['loss'] == pytest.approx(records[1]['measured'], rel=1e-5)


def test_reconstruction_keeps_more_and_is_evaluated_as_it_was_rounded(tmp_path):
  fields = {
    'calibration': 'rms_absmax',
    'target_format': 'int2',
    'formats': 'int2,int8',
  }
  nearest = search(**fields)
  rounded = search(rounding='reconstruction', workdir=tmp_path / 'run', **fields)
  assert nearest.formats == rounded.formats  # there is one assignment at this cost
  lost = [
    run.content['post_training']['unquantized']
    - run.content['post_training']['measured']
    for run in (nearest, rounded)
  ]
  assert lost[1] < 0.9 * lost[0]
  record = rounded.content['post_training']
  assert -rounded.eval['loss'] == pytest.approx(record['measured'], rel=1e-5)
  for layer in ('first', 'middle', 'last'):
    kernel = rounded.variables['params'][layer]['kernel']
    # All of them lie on the grid of int2.
    np.testing.assert_allclose(
      np.abs(kernel),
      np.where(kernel == 0, 0, np.abs(kernel).max(0, keepdims=True)),
      1e-6,
    )
  evaluated = fliqs_jax.evaluate(Network(nnx.Rngs(1)), BATCHES, tmp_path / 'run')
  assert evaluated == pytest.approx(dict(rounded.eval))
  report = rounded.export('stablehlo', tmp_path / 'exported')
  assert report['examples'] == 24


def test_reconstruction_of_pairs_rounds_to_the_formats_of_weights():
  result = search(
    rounding='reconstruction',
    calibration='rms_absmax',
    formats='int2:int8,int2:int4,int3:int2,int8',
    target_format='int2:int4',
  )
  largest = {'int2': 1, 'int3': 3, 'int8': 127}
  for layer, formats in result.formats.items():
    kernel = result.variables['params'][layer]['kernel']
    codes = largest[formats['weights']] * kernel / np.abs(kernel).max(0, keepdims=True)
    np.testing.assert_allclose(codes, np.round(codes), atol=1e-4)


def test_reconstruction_of_convolutions_from_a_checkpoint(config, trained, tmp_path):
  config.quantizer.calibration = 'rms_absmax'
  config.search.rounding = 'reconstruction'
  result = loop.run(config, tmp_path / 'run')
  setup, state, _ = evaluation.finished_run(epath.Path(tmp_path / 'run'))
  evaluate = evaluation.make_evaluate(setup, sharding.make_mesh(1))
  assert evaluate(state, np.zeros(0, np.int32)) == pytest.approx(result['eval'])
  before = evaluation.restored_state(setup, epath.Path(trained))[0].params
  kernels = [traverse_util.flatten_dict(p, sep='/') for p in (before, state.params)]
  for path, formats in result['formats'].items():
    old, new = (np.asarray(params[f'{path}/kernel']) for params in kernels)
    assert 0 < np.abs(new - old).max() < np.abs(old).max()
    largest = float(get_format(formats['weights']).max)
    codes = largest * new / np.abs(new).max(tuple(range(new.ndim - 1)))
    np.testing.assert_allclose(codes, np.round(codes), atol=1e-4 * largest)


def test_a_result_is_used_as_any_other(found):
  result, folder, _ = found
  assert {'search_result.json', 'config.json', 'layers.json', 'history.jsonl'} <= {
    path.name for path in folder.iterdir()
  }
  content = json.loads((folder / 'search_result.json').read_text())
  assert content['config']['search']['strategy'] == 'sensitivity'
  assert content['steps'] == 0
  evaluated = fliqs_jax.evaluate(Network(nnx.Rngs(1)), BATCHES, folder)
  assert evaluated == pytest.approx(dict(result.eval))
  assert 'Post-training accuracy: ' in repr(result)
  assert 'predicted as a sum over layers' in repr(result)
  assert 'Most sensitive, by increase of the loss: ' in repr(result)
  page = epath.Path(write_report([str(folder)])).read_text()
  assert 'Post-training accuracy' in page and 'Which layers are sensitive' in page
  logits = result.model(jnp.asarray(BATCHES[0]['image']))  # an NNX module
  assert logits.shape == (8, 4)
  # Again it is only read.
  assert search(workdir=folder).content == result.content


@pytest.fixture(scope='module')
def trained(tiny_config, tmp_path_factory):
  """The folder of a training in float32."""
  folder = tmp_path_factory.mktemp('trained') / 'run'
  config = tiny_config.copy_and_resolve_references()
  config.update(mode='train', formats='float32')
  loop.run(config, folder)
  return folder


@pytest.fixture
def config(tiny_config, trained):
  config = tiny_config.copy_and_resolve_references()
  config.update(init_from=str(trained), num_steps=0, eval_batch_size=128)
  config.search.update(strategy='sensitivity', pins=(('classifier', 'int8'),))
  return config


def test_a_run_from_a_checkpoint(config, trained, tmp_path):
  folder = tmp_path / 'run'
  result = loop.run(config, folder)
  assert result['cost'] <= result['target']
  assert set(result['sensitivities']) == set(result['policy'])
  assert result['formats']['classifier'] == dict.fromkeys(
    ('weights', 'activations'), 'int8'
  )
  # Batch norm's statistics are those under the formats found.
  setup, state, _ = evaluation.finished_run(epath.Path(folder))
  evaluate = evaluation.make_evaluate(setup, sharding.make_mesh(1))
  assert evaluate(state, np.zeros(0, np.int32)) == pytest.approx(result['eval'])
  float_result = json.loads((trained / 'search_result.json').read_text())
  params = evaluation.restored_state(setup, epath.Path(trained))[0].params
  jax.tree.map(np.testing.assert_array_equal, state.params, params)
  unquantized = result['post_training']['unquantized_eval']
  assert unquantized['loss'] == pytest.approx(float_result['eval']['loss'], rel=0.2)
  terminal.print_result(result, str(folder))


@pytest.mark.parametrize(
  'fields, expected',
  [
    ({'init_from': ''}, 'num_steps=0: expected trained weights, in init_from=DIR or'),
    ({'search.strategy': 'actor_critic'}, 'num_steps=0: expected a number above 0, or'),
    ({'mode': 'train', 'formats': 'int4'}, 'num_steps=0: expected a number above 0'),
    ({'search.target_scale': 0.01}, 'cannot be reached: expected one from'),
    ({'init_from': 'nowhere'}, "init_from='nowhere' does not exist"),
    (
      {'search.rounding': 'reconstruction'},
      'search.rounding=reconstruction: expected quantizer.calibration=absmax or rms_ab',
    ),
    ({'search.rounding': 'up'}, "search.rounding='up'"),
    ({'model.width': 0.125}, 'variables to start from: .* expected shape'),
  ],
)
def test_what_is_refused(config, tmp_path, fields, expected):
  config.update_from_flattened_dict(fields)
  with pytest.raises(ConfigError, match=expected) as error:
    loop.run(config, tmp_path / 'run')
  if 'model.width' not in fields:  # which has a line for each leaf
    assert len(error.value.problems) == 1
  assert not (tmp_path / 'run').exists()


def test_batches_of_another_shape_are_named():
  batches = [BATCHES[0], {**BATCHES[1], 'image': np.zeros((8, 7), np.float32)}]
  with pytest.raises(ConfigError, match=r'train_batches: a batch has .*\[B, 7\]'):
    fliqs_jax.search(
      Network(nnx.Rngs(0)), batches, BATCHES, strategy='sensitivity', num_steps=0,
      formats=FORMATS,
    )  # fmt: skip


def test_samples_do_not_split_the_batches(config):
  assert resolve(config).search.num_samples == 1


@pytest.mark.parametrize(
  'fields, expected',
  [
    ({'num_steps': 12}, 'search.max_quality_drop=1: expected num_steps=0, a search wi'),
    ({'search.target': 1.0}, 'max_quality_drop=1 and search.target=1: expected one of'),
    ({'search.max_quality_drop': -1.0}, 'max_quality_drop=-1.0: expected 0 or more'),
    (
      {'search.max_quality_drop': None, 'search.targets': ('int4', 'int8')},
      'search.targets=.*expected num_steps above 0',
    ),
  ],
)
def test_budgets_that_are_refused(config, tmp_path, fields, expected):
  config.search.update(max_quality_drop=1.0, num_samples=2)
  config.update_from_flattened_dict(fields)
  with pytest.raises(ConfigError, match=expected) as error:
    loop.run(config, tmp_path / 'run')
  assert len(error.value.problems) == 1
  assert not (tmp_path / 'run').exists()


def test_a_budget_of_quality(found, tmp_path):
  result, _, _ = found
  unquantized = result.content['post_training']['unquantized_eval']
  # In points of accuracy, of 24 examples.
  budgeted = search(workdir=tmp_path / 'run', max_quality_drop=100 * 2 / 24)
  front = budgeted.content['front']
  assert [point['cost'] for point in front] == sorted(point['cost'] for point in front)
  (chosen,) = (point for point in front if point['chosen'])
  assert budgeted.target is None and budgeted.cost == chosen['cost']
  lost = unquantized['accuracy'] - budgeted.eval['accuracy']
  assert chosen['lost'] == pytest.approx(100 * lost, abs=1e-4) and 24 * lost < 2.01
  assert all(point['cost'] >= chosen['cost'] for point in front if point['within'])
  assert f'Of {len(front)} assignments that were measured, the ' in repr(budgeted)
  page = epath.Path(write_report([str(tmp_path / 'run')])).read_text()
  assert 'What lower costs would lose' in page


def test_a_budget_that_no_assignment_meets(tmp_path):
  model = Network(nnx.Rngs(0))
  model.eval()
  batches = [{**batch, 'float': np.asarray(model(batch['image']))} for batch in BATCHES]
  with pytest.raises(ConfigError) as error:
    fliqs_jax.search(
      model, batches, batches, strategy='sensitivity', num_steps=0, formats=FORMATS,
      loss=lambda outputs, batch: jnp.square(outputs - batch['float']),
      max_quality_drop=0.0, statistics_batches=1, workdir=tmp_path / 'run',
    )  # fmt: skip
  (line,) = error.value.problems
  assert re.match(
    'search.max_quality_drop=0: every assignment of .* loses more of the unquantized '
    'quality of .*: measured .* in quality at .* GBOPs to .* in quality at .* GBOPs; ',
    line,
  )
  # Nothing but the lock of the folder.
  assert {path.name for path in (tmp_path / 'run').iterdir()} == {'.lock'}


def test_a_folder_with_what_was_trained_is_left_alone(config, trained):
  before = (trained / 'config.json').read_bytes()
  with pytest.raises(ConfigError, match='holds checkpoints of a run that trained'):
    loop.run(config, trained, allow_config_change=True)
  assert (trained / 'config.json').read_bytes() == before


def test_a_short_training_goes_on_from_what_was_found(found, tmp_path):
  result, _, _ = found
  model = Network(nnx.Rngs(1))  # whose own weights count for nothing
  fields = {'num_steps': 1, 'learning_rate': 1e-9, 'workdir': tmp_path / 'run'}
  finished = fliqs_jax.train(
    model, BATCHES, BATCHES, formats=result, variables=result.variables,
    weight_delay=0, activation_delay=0, **fields,
  )  # fmt: skip
  assert finished.formats == result.formats
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
    finished.variables['params'],
    result.variables['params'],
  )


def test_a_short_training_may_distil_the_float_network():
  model = Network(nnx.Rngs(0))
  model.eval()
  model.dropout.rate = 0.0  # whose noise is larger than what is lost
  batches = [{**batch, 'float': np.asarray(model(batch['image']))} for batch in BATCHES]

  def divergence(logits, batch):
    expected = jax.nn.log_softmax(batch['float'])
    return jnp.sum(jnp.exp(expected) * (expected - jax.nn.log_softmax(logits)), axis=-1)

  before, after = (
    fliqs_jax.train(
      model, batches, batches, formats='int2', loss=divergence, weight_delay=0,
      activation_delay=0, num_steps=steps, learning_rate=rate, weight_decay=0.0,
    ).eval['loss']
    for steps, rate in ((1, 1e-9), (60, 0.1))
  )  # fmt: skip
  assert after < 0.8 * before
