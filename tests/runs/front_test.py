"""Several targets from one supernet: the same as runs of their own, bit for bit."""

import shutil

from etils import epath
import jax
import numpy as np
import pytest

from fliqs_jax.errors import ConfigError, Preempted
from fliqs_jax.reporting import pareto_figure
from fliqs_jax.runs import evaluation, front, loop, preparation, targets
from fliqs_jax.runs.config import resolve

TARGETS = 'int3', '0.75*int4'


@pytest.fixture(scope='module')
def config(tiny_config):
  config = tiny_config.copy_and_resolve_references()
  config.search.update(strategy='actor_critic', targets=TARGETS, activation_delay=None)
  config.search.update(policy_delay=3, commit_step=7, num_samples=3)
  config.update(batch_size=30, log_every=2)
  return config


@pytest.fixture(scope='module')
def found(config, tmp_path_factory):
  folder = epath.Path(tmp_path_factory.mktemp('front') / 'run')
  return folder, front.run(config, folder, pareto_figure.write_sweep)


def params_of(config, folder):
  config = resolve(config)
  state, _ = evaluation.restored_state(preparation.prepare(config, folder), folder)
  return state.params


def test_each_target_is_met_and_has_its_own_formats(found, config):
  folder, points = found
  assert sorted(point['target'] for point in points) == sorted(TARGETS)
  assert [point['kind'] for point in points] == ['searched'] * 2
  assert (folder / 'pareto.png').read_bytes().startswith(b'\x89PNG')
  for name, run in front.plan(config).items():
    setup = preparation.prepare(run, folder / name)
    (cost,) = [point['cost'] for point in points if point['workdir'] == name]
    assert cost <= setup.target
  assert points[0]['cost'] < points[1]['cost']


def test_what_is_shared_changes_nothing(found, config, tmp_path):
  folder, points = found
  for name, run in front.plan(config).items():
    alone = loop.run(run, tmp_path / name)
    together = loop.run(run, folder / name)  # finished, and read
    assert alone == together
    assert together['cost'] in [point['cost'] for point in points]
    jax.tree.map(
      np.testing.assert_array_equal,
      params_of(run, epath.Path(tmp_path / name)),
      params_of(run, folder / name),
    )


def test_a_finished_front_takes_no_step(found, config, monkeypatch):
  folder, points = found
  monkeypatch.setattr(loop, '_loop', lambda *args: pytest.fail('a step was taken'))
  assert front.run(config, folder, pareto_figure.write_sweep) == points


def test_a_signal_at_the_last_shared_step_stops_the_run(config, tmp_path, monkeypatch):
  steps = []

  def reached(self, step):
    steps.append(step)
    return step == config.search.commit_step

  monkeypatch.setattr(loop.Preemption, 'reached', reached)
  with pytest.raises(Preempted, match='at step 7: start me again'):
    front.run(config, tmp_path, pareto_figure.write_sweep)
  assert steps == list(range(1, 8))  # none of a target's own
  with loop.Checkpoints(tmp_path / 'shared') as checkpoints:
    assert checkpoints.latest_step() == 7


def test_shared_steps_of_another_config_are_left_alone(found, config, tmp_path):
  folder, _ = found
  shutil.copytree(folder / 'shared', tmp_path / 'shared')
  changed = config.copy_and_resolve_references()
  changed.seed = 1
  with pytest.raises(ConfigError, match='another config: seed .0 there, 1 here.'):
    front.run(changed, tmp_path, pareto_figure.write_sweep)
  assert [path.name for path in tmp_path.iterdir()] == ['shared']


@pytest.mark.parametrize(
  'given, expected',
  [
    (('int3,int4',), ('int3', 'int4')),
    (('int3', 1.5, 2), ('int3', '1.5', '2')),
    ((' 0.75*int4 , int3', 'int8'), ('0.75*int4', 'int3', 'int8')),
  ],
)
def test_targets_are_split(given, expected):
  assert targets.split(given) == expected


@pytest.mark.parametrize(
  'changes, expected',
  [
    ({'targets': ('int3', 'int9')}, "search.targets: target 'int9': unknown format"),
    ({'targets': ('int3', 'int3')}, 'expected each target once'),
    ({'targets': ('int3', '1e9')}, 'cannot be reached'),
    ({'strategy': 'policy_gradient'}, 'expected actor_critic or sensitivity'),
    ({'targets': ((1,),)}, 'search.targets'),
  ],
)
def test_what_cannot_be_shared_is_named(config, tmp_path, changes, expected):
  changed = config.copy_and_resolve_references()
  changed.search.update(changes)
  with pytest.raises(ConfigError, match=expected):
    front.run(changed, tmp_path / 'run', pareto_figure.write_sweep)
  assert not (tmp_path / 'run').exists()


def test_an_index_beyond_the_targets_is_named(config):
  changed = config.copy_and_resolve_references()
  changed.search.target_index = 2
  with pytest.raises(ConfigError, match='expected one from 0 to 1'):
    resolve(changed)
