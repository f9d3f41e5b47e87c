"""The analysis, against arithmetic and the table of thresholds."""

import importlib.util
import json

from conftest import ROOT, load_config
from etils import epath
import jax
import jax.numpy as jnp
from made_up_runs import OPTIONS, write_run
from matplotlib import ticker
import ml_dtypes
import numpy as np
import pytest
import whole_runs

from fliqs_jax.numerics import quantization_error
from fliqs_jax.numerics.formats import get_format
from fliqs_jax.reporting import analysis, analysis_figures
from fliqs_jax.reporting.recorded_run import read_run
from fliqs_jax.runs.config import resolve

NAMES = ('int2', 'int3', 'int4', 'int8', 'e2m1', 'e4m3', 'bf16', 'float32')


@pytest.fixture(scope='module')
def normal_mse():
  """The closed form of the error of N(0, 1) data, from the benchmark."""
  path = ROOT / 'benchmarks' / 'clipping_thresholds.py'
  spec = importlib.util.spec_from_file_location('clipping_thresholds', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return lambda threshold, name: module.normal_mse(
    threshold, module.representable_values(name)
  )


@pytest.fixture(scope='module')
def errors():
  tensors = [
    jax.random.normal(jax.random.key(0), (3, 3, 64, 8)),
    5 * jax.random.normal(jax.random.key(1), (200, 4)),
  ]
  return quantization_error.switching_errors(tensors, NAMES)


def test_switching_to_the_same_format_changes_nothing(errors):
  np.testing.assert_array_equal(np.diag(errors), 0)
  np.testing.assert_array_equal(errors, errors.T)


def test_switching_errors_keep_the_triangle_inequality(errors):
  distance = np.sqrt(errors)  # of rounded tensors, in one norm
  around = distance[:, :, None] + distance[None]
  assert (distance[:, None] <= around.transpose(0, 2, 1) * (1 + 1e-9)).all()


def test_switching_errors_grow_where_bits_are_few(errors):
  to_float = dict(zip(NAMES, errors[NAMES.index('float32')]))
  assert to_float['int2'] > 3 * to_float['int3'] > 9 * to_float['int4']
  assert to_float['int4'] > 50 * to_float['int8']
  fewest = errors[NAMES.index('int2')]
  assert (np.delete(fewest, 0) > errors[NAMES.index('int8'), 1:]).all()


def test_switching_error_by_hand():
  # In bf16: 1 and 1 + 2⁻⁷ stay; 1 + 2⁻⁹ becomes 1.
  tensor = np.array([[1.0], [1 + 2.0**-7], [1 + 2.0**-9]], np.float32)
  found = quantization_error.switching_errors([tensor], ('float32', 'bf16'))
  rounded = tensor.astype(ml_dtypes.bfloat16).astype(np.float32)
  np.testing.assert_array_equal(rounded[:, 0], [1, 1 + 2.0**-7, 1])
  expected = (2.0**-9) ** 2 / np.sum(np.square(tensor, dtype=np.float64))
  np.testing.assert_allclose(found, [[0, expected], [expected, 0]], rtol=1e-6)


@pytest.mark.parametrize('name', ['int2', 'int4', 'int8', 'e2m1', 'e3m2', 'e4m3'])
def test_clipping_errors_of_normal_data(name, normal_mse):
  in_use = float(get_format(name).clip)
  thresholds = np.array([0.8, in_use, 4.0])
  data = [quantization_error.normal_values()]
  found = quantization_error.clipping_errors(data, name, thresholds)
  expected = [normal_mse(threshold, name) for threshold in thresholds]
  np.testing.assert_allclose(found, expected, rtol=0.02)


def test_the_best_threshold_of_normal_data_is_the_one_in_use():
  grid = np.geomspace(1, 8, 40)
  data = [quantization_error.normal_values(200_000)]
  for name in ('int2', 'int3', 'int4', 'int8', 'e2m1'):
    errors = quantization_error.clipping_errors(data, name, grid)
    best = grid[quantization_error.best_threshold(errors)]
    in_use = float(get_format(name).clip)
    assert abs(np.log(best / in_use)) < np.log(grid[1] / grid[0]), name


def test_of_minima_that_agree_the_first_is_the_best():
  errors = np.array([5, 1.0005, 2, 1, 3, 1.0001])
  assert quantization_error.best_threshold(errors) == 1
  assert quantization_error.best_threshold(np.array([5, 1.1, 2, 1, 3])) == 3


def test_scaling_a_channel_changes_no_relative_error():
  weights = jax.random.normal(jax.random.key(0), (64, 1))
  both = jnp.concatenate([weights, 8 * weights], axis=1)
  one, two = (
    quantization_error.clipping_errors([tensor], 'int4', np.array([1.0, 2.5]))
    for tensor in (weights, both)
  )
  np.testing.assert_allclose(one, two, rtol=1e-5)


def test_bits_by_depth(tmp_path):
  names = ['a', 'b', 'c', 'd']
  one = read_run(str(write_run(tmp_path / 'one', names)))
  other = read_run(str(write_run(tmp_path / 'other', names, formats={
      name: dict.fromkeys(('weights', 'activations'), option)
      for name, option in zip(names, reversed(OPTIONS))
  })))  # fmt: skip
  rows = analysis.formats_by_depth([one, other])
  # 2, 4, 8, 16 and 16, 8, 4, 2.
  assert [row['bits'] for row in rows] == [9, 6, 6, 9]
  figure = analysis_figures.formats_by_depth(rows)
  assert [t.get_text() for t in figure.axes[0].get_xticklabels()] == names
  # Layers are points: what a line between them would say means nothing.
  assert {line.get_linestyle() for line in figure.axes[0].lines} == {'None'}
  another = read_run(str(write_run(tmp_path / 'another', ['x'])))
  with pytest.raises(ValueError, match='another network'):
    analysis.formats_by_depth([one, another])


@pytest.mark.parametrize(
  'reached, label',
  [
    ({'accuracy': 0.5, 'standard_error': 0.1}, 'one-shot accuracy'),
    (
      {'bits_per_byte': 2.5, 'standard_error': None},
      'one-shot bits per byte (lower is better)',
    ),
    ({'minus_the_loss': -1.0, 'standard_error': None}, 'one-shot minus the loss'),
  ],
)
def test_entropy_weights_are_compared_by_what_the_task_is_judged_by(reached, label):
  row = {'weight': 0.1, 'steps': [1, 2], 'entropy': [1.0, 0.5], **reached}
  left, right = analysis_figures.entropy([row, row]).axes
  assert right.get_ylabel() == label
  percent = isinstance(right.yaxis.get_major_formatter(), ticker.PercentFormatter)
  assert percent == ('accuracy' in label)


def test_entropy_weights_are_those_of_the_policy_gradient(tmp_path, monkeypatch):
  searched = []

  def run(config, workdir):
    searched.append(resolve(config))
    write_run(workdir, ['a'])
    for path in (workdir / 'history.jsonl',):
      rows = [json.loads(line) | {'entropy': 1.0} for line in path.open()]
      path.write_text('\n'.join(map(json.dumps, rows)))
    return read_run(str(workdir)).result

  monkeypatch.setattr(analysis.loop, 'run', run)
  config = load_config('resnet18', 'digits')
  rows = analysis.entropy(config, epath.Path(tmp_path))
  assert [row['accuracy'] for row in rows] == [0.75] * len(analysis.ENTROPY_WEIGHTS)
  # Only this strategy has such a weight, and its own default reward.
  assert {c.search.strategy for c in searched} == {'policy_gradient'}
  assert {c.reward.quality for c in searched} == {'accuracy'}
  weights = tuple(c.controller.entropy_weight for c in searched)
  assert weights == analysis.ENTROPY_WEIGHTS


def test_weights_of_another_network_are_refused(tmp_path):
  run = write_run(tmp_path / 'run', ['a'])
  config = resolve(load_config('mobilenet_v2', 'digits'))
  with pytest.raises(ValueError, match="of model {'name': 'resnet18'.*'mobilenet_v2'"):
    analysis.network_weights(config, str(run))


def test_the_command(tmp_path):
  run = write_run(tmp_path / 'run', ['a', 'b'])

  folder = tmp_path / 'figures'
  result = whole_runs.command(
    'analysis', '--figure=formats', '--config=configs/resnet18.py:digits',
    f'--folder={folder}', f'--workdir={run}',
  )  # fmt: skip
  assert result.returncode == 0, result.stderr
  assert (folder / 'formats.png').read_bytes().startswith(b'\x89PNG')
  assert [r['bits'] for r in json.loads((folder / 'formats.json').read_text())] == [
    2,
    4,
  ]
