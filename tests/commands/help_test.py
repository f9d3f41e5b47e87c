"""The help of every command: short, and with an example that works as printed."""

import json
import os
import re
import shlex

from conftest import ROOT
import one_block
import pytest
import whole_runs

# What makes the examples short, as one block of the network does; the formats stay
# those of the config.
NARROW = '--config.model.width=0.0625'
SHORT = f'{NARROW} --config.num_steps=4 --config.search.statistics_batches=1'
COMMANDS = ('main', 'overview', 'measure', 'sweep', 'report', 'analysis', 'export')


@pytest.fixture(scope='module')
def shell(tmp_path_factory):
  """A folder with `configs` in it, and a function that runs a command line there."""
  folder = tmp_path_factory.mktemp('help')
  (folder / 'configs').symlink_to(ROOT / 'configs')

  def run(line, status=0, prepare=one_block.shrink):
    program, flag, module, *arguments = shlex.split(line.replace('\\\n', ' '))
    assert (program, flag) == ('python', '-m')
    command = module.removeprefix('fliqs_jax.')
    result = whole_runs.command(command, *arguments, cwd=folder, prepare=prepare)
    assert result.returncode == status, f'{line}\n{result.stderr}'
    return result.stderr if status else result.stdout

  return folder, run


@pytest.fixture(scope='module')
def example(shell):
  """A function that runs the one example in a command's help."""

  def run(command, *more, **kwargs):
    text = shell[1](f'python -m fliqs_jax.{command} --help')
    about, flags = text.split('\nflags:\n')
    assert len(about.splitlines()) <= 12
    assert f'fliqs_jax/{command}.py:' in flags and 'missing' not in text
    ((line, _),) = re.findall(r'^    (python -m (.*\\\n)*.*)$', about, re.MULTILINE)
    assert line.startswith(f'python -m fliqs_jax.{command} ')
    return about, shell[1](' '.join((line, *more)), **kwargs)

  return run


@pytest.fixture(scope='module')
def searched(example, data_dir):
  """Lines that the example of `main` printed, whose run others read."""
  return example('main', SHORT, f'--config.input.data_dir={data_dir}')[1]


def test_main(shell, searched):
  folder = shell[0] / 'runs/digits'
  result = json.loads((folder / 'search_result.json').read_text())
  assert result['steps'] == 4 and result['cost'] <= result['target']
  assert f'Report: {os.path.relpath(folder, shell[0])}/report.html' in searched
  page = (folder / 'report.html').read_text()
  for text in ('stage1_block1/conv2', 'Where the cost is', 'How the policy got there'):
    assert text in page
  for text in ('conv_init', 'classifier', 'of the target', 'One-shot accuracy'):
    assert text in searched


def test_report(shell, searched, example):
  page = shell[0] / 'runs/digits/report.html'
  page.unlink()
  assert 'report.html' in example('report')[1]
  assert page.exists()
  assert list((page.parent / 'report_figures').glob('*.png'))


def test_export(shell, searched, example):
  printed = example('export')[1]
  folder = shell[0] / 'runs/digits/export/stablehlo'
  report = json.loads((folder / 'report.json').read_text())
  assert report['agreement'] == 1.0
  assert 'runs/digits/export/stablehlo/model.stablehlo' in printed
  # Mistakes are one line, found before the run is read.
  line = 'python -m fliqs_jax.export --workdir=runs/digits'
  (problem,) = shell[1](f'{line} --to=tflite', 2).strip().splitlines()
  assert "unknown target 'tflite'" in problem


def test_overview(example):
  # The common ResNet-18: parameters as torchvision counts them.
  assert '11,689,512 parameters' in example('overview', prepare=None)[1]


def test_measure(shell, example):
  example('measure', NARROW, '--repeats=1', '--batch_size=1')
  table = json.loads((shell[0] / 'latency.json').read_text())
  assert {'int2', 'int3', 'int4', 'int8'} <= set(table['entries'][0]['formats'])
  # The cost model `latency_table` reads it.
  shown = shell[1](
    f'python -m fliqs_jax.overview --config=configs/resnet18.py:digits {NARROW} '
    '--config.search.cost_model=latency_table --format=int8 '
    '--config.search.latency_table=latency.json'
  )
  assert re.search(r' (ms|µs) \(latency_table\)', shown)


@pytest.mark.usefixtures('searched')
def test_the_network_of_a_run_is_timed(shell):
  line = 'python -m fliqs_jax.measure --workdir=runs/digits --end_to_end'
  shown = shell[1](f'{line} --repeats=1 --batch_size=2')
  names = ['found', 'float32', 'bf16', 'int2', 'int3', 'int4', 'int8']
  assert re.findall(r'^ +(\w+) +stablehlo +2 ', shown, re.MULTILINE) == names
  for mistake, expected in (
    (line.replace('--workdir=runs/digits', ''), '--workdir is missing'),
    (f'{line} --out=times.json', '--out has no use for --end_to_end'),
    (line.replace('runs/digits', 'configs'), 'holds no run'),
    (f'{line} --to=qwix', "no speed of target 'qwix'"),
  ):
    (problem,) = shell[1](mistake, 2).strip().splitlines()
    assert expected in problem


def test_sweep(shell):
  # Its runs take a minute; `sweep_test.py` has them.
  text = shell[1]('python -m fliqs_jax.sweep --help')
  ((line, _),) = re.findall(r'^    (python -m (.*\\\n)*.*)$', text, re.MULTILINE)
  # Of all that the example says, nothing else is wrong.
  (problem,) = shell[1](f'{line} --config.search.formats=int9', 2).strip().splitlines()
  assert "'int9'" in problem


def test_analysis(shell, example, data_dir):
  example('analysis', NARROW, f'--config.input.data_dir={data_dir}')
  folder = shell[0] / 'runs/analysis'
  numbers = json.loads((folder / 'switching.json').read_text())
  assert numbers['formats'] == ['int2', 'int3', 'int4', 'int8']
  assert (folder / 'switching.png').read_bytes().startswith(b'\x89PNG')
