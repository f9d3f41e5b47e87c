"""Commands as a user types them: exit status, one line for each mistake."""

import json
import subprocess
import sys
import textwrap

from conftest import ROOT
import pytest
import whole_runs

CONFIG = '--config=configs/resnet18.py:digits'


def command(module, *arguments):
  """Runs a command in a Python of its own, whose imports must print nothing either."""
  return subprocess.run(
    [sys.executable, '-m', f'fliqs_jax.{module}', *arguments],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )


@pytest.mark.parametrize(
  'arguments, expected',
  [
    ([CONFIG], '--workdir is missing'),
    ([CONFIG, '--workdir='], '--workdir is empty: expected --workdir=WORKDIR'),
    (['--config=', '--workdir={}'], '--config is empty'),
    (['--config=configs', '--workdir={}'], "'configs' is a folder that holds no run"),
    (['--config=configs/nope.py', '--workdir={}'], "'configs/nope.py' does not exist"),
    (['--config=configs/resnet18.py:digit', '--workdir={}'], "variant 'digit'"),
    ([CONFIG, '--workdir={}', '--config.serach.formats=int4'], "'search.formats'"),
    ([CONFIG, '--workdir={}', '--config.num_steps=many'], "'many'"),
    ([CONFIG, '--workdir={}', '--config.search.num_samples=0'], 'num_samples=0'),
    ([CONFIG, '--workdir={}', 'more'], "unexpected argument 'more'"),
    ([CONFIG, '--wordkir={}'], 'Did you mean: workdir'),
  ],
)
def test_mistakes_end_with_one_line_and_status_2(arguments, expected, tmp_path):
  workdir = tmp_path / 'run'
  result = whole_runs.command('main', *(a.format(workdir) for a in arguments))
  assert result.returncode == 2
  lines = result.stderr.strip().splitlines()
  assert len(lines) == 1 and lines[0].startswith('error: ') and expected in lines[0]
  assert not workdir.exists()


def test_fields_of_a_config_may_be_empty():
  empty = '--config.compilation_cache=', '--config.formats='
  result = whole_runs.command('overview', CONFIG, *empty)
  assert result.returncode == 0, result.stderr


def test_a_file_that_cannot_be_written_is_refused_before_time_is_spent(tmp_path):
  for out in (tmp_path, tmp_path / 'none' / 'latency.json', '/proc/latency.json'):
    result = whole_runs.command('measure', CONFIG, f'--out={out}')
    assert result.returncode == 2
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith(f'error: --out={out}: ')


def run_main(statements):
  """Runs a program whose `main(argv)` has these statements."""
  program = (
    'import threading, jax\n'
    'from fliqs_jax import command_line, errors\n'
    f'def main(argv):\n{textwrap.indent(statements, "  ")}\n'
    'command_line.run(main, required=())\n'
  )
  return subprocess.run(
    [sys.executable, '-c', program],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=120,
  )


def test_a_network_beyond_the_memory_ends_with_one_line():
  result = run_main('jax.device_get(jax.numpy.ones((2**20, 2**25)))')
  assert result.returncode == 1
  (line,) = result.stderr.strip().splitlines()
  assert line.startswith('error: Out of memory') and 'model.width' in line


def test_a_run_that_cannot_go_on_waits_for_no_thread():
  # Those that write a checkpoint may never end once one of them has failed.
  result = run_main(
    'threading.Thread(target=threading.Event().wait).start()\n'
    'raise errors.RunError("no room")'
  )
  assert (result.returncode, result.stderr) == (1, 'error: no room\n')


def test_unprepared_dataset_says_how_to_prepare_it(tmp_path):
  result = command(
      'main', '--config=configs/resnet18.py', f'--workdir={tmp_path / "run"}',
      f'--config.input.data_dir={tmp_path}',
  )  # fmt: skip
  assert result.returncode == 2
  (line,) = result.stderr.strip().splitlines()
  assert 'tfds build imagenet2012 --file_format=array_record' in line
  assert ':digits' in line
  assert not (tmp_path / 'run').exists()


def test_overview_reproduces_a_published_cost():
  result = command(
      'overview', '--config=configs/resnet18.py', '--format=e4m3', '--json',
      '--config.model.project_first_block=True', '--config.model.width=0.5',
  )  # fmt: skip
  assert result.returncode == 0, result.stderr
  content = json.loads(result.stdout)
  assert set(content) == {
      'model', 'architecture', 'cost_model', 'cost_unit', 'format', 'total', 'params',
      'training_params', 'macs', 'layers', 'uniform_costs', 'budgets', 'device',
  }  # fmt: skip
  assert (
    f'{content["total"]:.2f}' == '31.13'
  )  # ResNet-18 in E4M3 at width 0.5, as FLIQS publishes it
  assert content['total'] == pytest.approx(64e-9 * content['macs'])
  assert content['macs'] == sum(layer['macs'] for layer in content['layers'])
  assert set(content['layers'][0]) == {
      'name', 'kind', 'macs', 'params', 'weights', 'activations', 'cost'
  }  # fmt: skip


def test_overview_of_an_unknown_format():
  result = whole_runs.command('overview', CONFIG, '--format=int9')
  assert result.returncode == 2
  assert "the nearest is 'int8'" in result.stderr
