"""Sweeps: which runs there are, how they go on, and the Pareto front."""

import json

from hypothesis import given
from hypothesis import strategies as st
import pytest

from fliqs_jax.errors import ConfigError, Preempted
from fliqs_jax.reporting import pareto_figure, terminal
from fliqs_jax.runs import loop
from fliqs_jax.runs import sweep as sweeps
from fliqs_jax.runs import targets as targets_lib
from fliqs_jax.runs.pareto import pareto_front
from fliqs_jax.runs.result import RESULT_FILE, config_to_json

LEVELS = st.integers(0, 6)  # few, so that ties are frequent


def sweep(*args):
  return sweeps.sweep(*args, draw=pareto_figure.write_sweep)


@given(st.lists(st.tuples(LEVELS, LEVELS), max_size=12))
def test_front_is_what_no_point_beats(pairs):
  def beats(p, q):
    return p != q and p[0] <= q[0] and p[1] >= q[1]

  expected = [not any(beats(p, q) for p in pairs) for q in pairs]
  assert pareto_front(pairs) == expected


@pytest.mark.parametrize(
  'text, fields',
  [
    ('int4', {'target': None, 'target_format': 'int4', 'target_scale': 1.0}),
    ('0.5*int8', {'target': None, 'target_format': 'int8', 'target_scale': 0.5}),
    (' 2 * e4m3', {'target': None, 'target_format': 'e4m3', 'target_scale': 2.0}),
    ('1e-3', {'target': 0.001}),
  ],
)
def test_targets(text, fields):
  assert targets_lib.parse(text) == fields


@pytest.mark.parametrize(
  'text', ['', '*', 'int9', '0.5*', '0.5*0.5', '-1', '0', 'x*int4', '-1*int4', 'inf']
)
def test_malformed_targets(text):
  with pytest.raises(ValueError):
    targets_lib.parse(text)


def test_plan(tiny_config):
  targets = [targets_lib.parse(t) for t in ('int3', '0.5*e4m3', '0.01')]
  runs = sweeps.plan(tiny_config, targets, [0.0625, 0.125])
  names = [
    f'{kind}-width{width}'
    for width in (0.0625, 0.125)
    for kind in (
      *(f'uniform-{name}' for name in ('int2', 'int3', 'int4', 'int8', 'e4m3')),
      *(f'searched-{target}' for target in ('int3', '0.5xe4m3', '0.01')),
    )
  ]
  assert list(runs) == names
  run = runs['searched-0.5xe4m3-width0.125']
  assert (run.mode, run.model.width) == ('search', 0.125)
  assert (run.search.target_format, run.search.target_scale) == ('e4m3', 0.5)
  assert runs['searched-0.01-width0.125'].search.target == 0.01
  assert runs['uniform-int8-width0.0625'].formats == 'int8'


@pytest.fixture
def fake_runs(monkeypatch):
  """Replaces training; returns the names run, and those that are to fail."""
  ran, failing = [], set()
  evaluations = {
    'train': {'accuracy': 0.5, 'loss': 1.0, 'num_examples': 9},
    'search': {'accuracy': 0.75, 'loss': 1.0, 'num_examples': 9},
  }

  def run(config, workdir):
    path = workdir / RESULT_FILE
    if path.exists():
      return
    ran.append(workdir.name)
    if workdir.name in failing:
      raise FloatingPointError('loss is nan\nand more')
    workdir.mkdir(parents=True)
    result = {
      'model': config.model.name,
      'dataset': config.dataset,
      'cost_model': config.search.cost_model,
      'cost_unit': 'GBOPs',
      'steps': config.num_steps,
      'cost': float(len(ran)),
      'formats': {'conv_init': 'int8'},
      'eval': evaluations[config.mode],
      'config': config_to_json(config),
    }
    path.write_text(json.dumps(result))

  monkeypatch.setattr(loop, 'run', run)
  return ran, failing, evaluations


def test_sweep_that_is_asked_to_stop_stops(tiny_config, tmp_path, monkeypatch):
  started = []

  def run(config, workdir):
    started.append(workdir.name)
    raise Preempted('stopped by SIGTERM')

  monkeypatch.setattr(loop, 'run', run)
  with pytest.raises(Preempted):
    sweep(tiny_config, str(tmp_path / 'sweep'), ['int3', 'int4'], [])
  assert len(started) == 1


def test_sweep_fails_goes_on_and_is_extended(tiny_config, tmp_path, fake_runs):
  ran, failing, _ = fake_runs
  config = tiny_config.copy_and_resolve_references()
  config.search.formats = 'int2,int4'
  folder = tmp_path / 'sweep'
  failing.add('uniform-int4-width0.0625')
  points, failed = sweep(config, str(folder), ['0.5*int4'], [])
  assert failed == ['uniform-int4-width0.0625']
  assert [(p['kind'], p['target'], p['width'], p['on_front']) for p in points] == [
    ('uniform', 'int2', 0.0625, True),
    ('searched', '0.5*int4', 0.0625, True),
  ]
  assert json.loads((folder / 'pareto.json').read_text()) == points
  assert set(points[0]) == {
      'kind', 'target', 'width', 'cost', 'cost_unit', 'accuracy', 'standard_error',
      'model', 'dataset', 'steps', 'seed', 'workdir', 'on_front',
  }  # fmt: skip
  assert (folder / 'pareto.png').read_bytes().startswith(b'\x89PNG')

  failing.clear()
  ran.clear()
  points, failed = sweep(config, str(folder), ['0.75*int4'], ['0.0625', '0.125'])
  assert not failed
  assert ran == [
    'uniform-int4-width0.0625',
    'searched-0.75xint4-width0.0625',
    'uniform-int2-width0.125',
    'uniform-int4-width0.125',
    'searched-0.75xint4-width0.125',
  ]
  assert len(points) == 2 + len(ran)  # with those of the first call
  assert {(folder / point['workdir']).is_dir() for point in points} == {True}

  config.num_steps += 1
  with pytest.raises(ConfigError, match='another'):
    sweep(config, str(folder), ['0.6*int4'], ['0.25'])
  assert len(json.loads((folder / 'pareto.json').read_text())) == len(points)


@pytest.mark.parametrize(
  'key, worse, better, title',
  [
    ('bits_per_byte', 3.0, 2.5, 'bits per byte (lower is better)'),
    ('quality', 2.5, 3.0, 'quality'),
    ('loss', 3.0, 2.5, 'minus the loss'),
  ],
)
def test_a_sweep_is_judged_by_what_its_task_is(
  tiny_config, tmp_path, fake_runs, capsys, key, worse, better, title
):
  *_, evaluations = fake_runs
  evaluations['train'] = {'loss': 1.0, 'num_examples': 9, key: worse}
  evaluations['search'] = {'loss': 1.0, 'num_examples': 9, key: better}
  config = tiny_config.copy_and_resolve_references()
  config.search.formats = 'int2,int4'
  points, _ = sweep(config, str(tmp_path / 'sweep'), ['0.5*int4'], [])
  fronts = {point['workdir']: point['on_front'] for point in points}
  # Costs are counted up: int2's comes first, int4's is beaten.
  assert list(fronts.values()) == [True, False, True]
  terminal.print_points(points, [], 'folder')
  assert title in capsys.readouterr().out


def test_all_that_is_wrong_is_said_before_the_first_run(
  tiny_config, tmp_path, fake_runs
):
  config = tiny_config.copy_and_resolve_references()
  config.seed = -1
  config.search.formats = 'int4,int8'
  with pytest.raises(ConfigError) as error:
    sweep(
      config, str(tmp_path / 'sweep'), ['int9', '0.01*int4', 'int4'], ['wide', '0.125']
    )
  problems = error.value.problems
  for fragment in (
    "target 'int9': unknown format",
    "width 'wide': expected a number above 0",
    'seed=-1',
  ):
    assert sum(fragment in line for line in problems) == 1, problems
  assert not fake_runs[0] and not (tmp_path / 'sweep').exists()

  config.seed = 0
  with pytest.raises(ConfigError) as error:
    sweep(config, str(tmp_path / 'sweep'), ['0.01*int4', 'int4'], [])
  (problem,) = error.value.problems
  assert problem.startswith('searched-0.01xint4-width0.0625: the target of')

  config.mode = 'train'
  with pytest.raises(ConfigError, match='mode='):
    sweep(config, str(tmp_path / 'sweep'), ['int4'], [])


def test_a_folder_that_cannot_be_made_ends_before_the_first_run(tiny_config, fake_runs):
  with pytest.raises(ConfigError, match='/proc/sweep.* cannot be made'):
    sweep(tiny_config, '/proc/sweep', ['int3'], [])
  assert not fake_runs[0]
