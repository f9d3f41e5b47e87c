"""A search of a language model from its config to its report, and what stops one."""

import json

from conftest import load_config
import pytest

from fliqs_jax.errors import ConfigError
from fliqs_jax.reporting import comparison, summary, terminal
from fliqs_jax.reporting.recorded_run import read_run
from fliqs_jax.runs import loop, sweep
from fliqs_jax.runs.checkpoints import Checkpoints
from fliqs_jax.runs.config import resolve
from fliqs_jax.runs.validation import validate


class Stopped(Exception):
  """The run was interrupted."""


@pytest.fixture(scope='module')
def finished(text_config, tmp_path_factory):
  """The workdir and the result of a search."""
  workdir = tmp_path_factory.mktemp('run') / 'searched'
  return workdir, loop.run(text_config, workdir)


def test_search(finished):
  _, result = finished
  assert set(result['eval']) == {'bits_per_byte', 'loss', 'num_examples'}
  assert result['eval']['num_examples'] == 4_096
  assert 4 < result['eval']['bits_per_byte'] < 9  # log2(256) is 8
  assert result['cost'] <= result['target'] * (1 + 1e-6)


def test_resumed_run_ends_the_same(finished, text_config, tmp_path, monkeypatch):
  save = Checkpoints.save

  def stop(checkpoints, state, batches):
    save(checkpoints, state, batches)
    raise Stopped

  monkeypatch.setattr(Checkpoints, 'save', stop)
  with pytest.raises(Stopped):
    loop.run(text_config, tmp_path / 'searched')
  monkeypatch.undo()
  assert loop.run(text_config, tmp_path / 'searched') == finished[1]
  histories = [
    (folder / 'history.jsonl').read_text()
    for folder in (finished[0], tmp_path / 'searched')
  ]
  assert histories[0] == histories[1]
  assert 'bits_per_byte' in json.loads(histories[0].splitlines()[-1])


def test_report_says_bits_per_byte(finished, capsys):
  workdir, result = finished
  run = read_run(str(workdir))
  assert 'bits per byte on 4,096 examples' in summary.headline(run, {})
  assert '4096 examples' in ' '.join(terminal.summary_lines(result))
  terminal.print_result(result, str(workdir))
  assert 'One-shot bits per byte: ' in capsys.readouterr().out
  better = run._replace(
    label='better',
    result=result | {'eval': {**result['eval'], 'bits_per_byte': 1.0}},
  )
  points = comparison.points([run, better])
  assert [point['on_front'] for point in points] == [False, True]
  assert points[1]['quality'] == 1.0


def test_points_of_a_sweep(finished, capsys):
  workdir = finished[0].rename(finished[0].parent / 'searched-int3-width1')
  (point,) = sweep.read_points(workdir.parent)
  workdir.rename(finished[0])
  assert point['bits_per_byte'] == finished[1]['eval']['bits_per_byte']
  assert 'accuracy' not in point and point['on_front']
  terminal.print_points([point], [], 'folder')
  assert 'bits per byte' in capsys.readouterr().out


@pytest.mark.parametrize(
  'changes, expected',
  [
    ({'input.context': 0}, 'input.context=0: expected a number above 0'),
    ({'input.mixup_alpha': 0.2}, 'input.mixup_alpha=0.2'),
    ({'optimizer.label_smoothing': 0.1}, 'optimizer.label_smoothing=0.1'),
    ({'reward.quality': 'accuracy'}, "reward.quality='accuracy'"),
    (
      {
        'search.strategy': 'policy_gradient',
        'reward.name': 'soft_exponential',
        'reward.beta': -0.1,
      },
      'multiplies the quality',
    ),
  ],
)
def test_unusable_config(text_config, changes, expected):
  config = text_config.copy_and_resolve_references()
  config.update_from_flattened_dict(changes)
  (problem,) = validate(resolve(config), num_devices=1)
  assert expected in problem


def test_network_of_images_on_texts(text_config, tmp_path):
  config = text_config.copy_and_resolve_references()
  config.model = {'name': 'resnet18', 'width': 0.125}
  with pytest.raises(ConfigError, match="'resnet18' cannot be built for texts of"):
    loop.run(config, tmp_path / 'run')


def test_unknown_variant():
  with pytest.raises(
    ValueError, match="unknown variant 'digits': expected one of lm1b"
  ):
    load_config('transformer_lm', 'digits')


@pytest.mark.parametrize('variant', ['lm1b', 'stdlib'])
def test_recipes_are_valid(variant):
  assert validate(resolve(load_config('transformer_lm', variant)), num_devices=1) == []
