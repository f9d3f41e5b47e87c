"""The page about deployment: its commands and programs run as they are written."""

import functools
import json
import re
import shlex
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request

import child_functions
from conftest import ROOT
import numpy as np
import pytest
from tiny_deployments import both
import whole_runs

from fliqs_jax.exporting import loading

PAGE = (ROOT / 'docs/deploy.md').read_text()
BLOCKS = re.findall(r'```(\w+)\n(.*?)```', PAGE, re.DOTALL)
COMMANDS = [
  line for kind, text in BLOCKS if kind == 'sh' for line in text.strip().splitlines()
]
PROGRAMS = [text for kind, text in BLOCKS if kind == 'python']


@pytest.fixture(scope='module')
def folder(finished, tmp_path_factory):
  """The folder of the page's commands, with a finished run in `runs/digits`."""
  folder = tmp_path_factory.mktemp('page')
  run = folder / 'runs/digits'
  shutil.copytree(finished, run)
  result = json.loads((run / 'search_result.json').read_text())
  # What Qwix takes in a convolution, and few models to time.
  result['formats'] = dict.fromkeys(result['formats'], both('int8'))
  result['uniform_costs'] = {}
  (run / 'search_result.json').write_text(json.dumps(result))
  return folder


def command(line, folder, *more, **kwargs):
  """Runs a command of this package as the page has it."""
  program, flag, module, *arguments = shlex.split(line)
  assert (program, flag) == ('python', '-m'), line
  module = module.removeprefix('fliqs_jax.')
  return whole_runs.command(module, *arguments, *more, cwd=folder, **kwargs)


@pytest.fixture(scope='module')
def done(folder):
  """The folder after all commands of the page."""
  assert COMMANDS[0] == "pip install -e '.[export]'"
  for line in COMMANDS[1:]:
    repeats = ['--repeats=1'] if 'fliqs_jax.measure' in line else []
    result = command(line, folder, *repeats)
    assert result.returncode == 0, f'{line}\n{result.stderr}'
    folds = '--fold_batch_norm' in line
    assert ('  1 batch normalisations are folded' in result.stdout) == folds
  return folder


def test_commands_leave_what_the_page_names(done):
  run = done / 'runs/digits'
  targets = re.findall(r'^\| `(\w+)` \|', PAGE, re.MULTILINE)
  assert sorted(path.name for path in (run / 'export').iterdir()) == sorted(targets)
  assert (run / 'speed.json').is_file()


def program(start):
  """The one program of the page that begins so."""
  (text,) = [text for text in PROGRAMS if text.startswith(start)]
  return text


@pytest.mark.parametrize('target', ['stablehlo', 'onnx'])
def test_the_loaders(target, done, monkeypatch):
  folder = done / 'runs/digits/export' / target
  monkeypatch.chdir(folder)
  monkeypatch.syspath_prepend(folder)
  names = {'images': np.zeros((2, 8, 8, 1), np.uint8)}
  exec(program('from load_stablehlo').replace('stablehlo', target), names)
  assert np.shape(names['logits']) in ((2, 10), (1, 2, 10))


def test_rules_for_qwix(done, monkeypatch):
  folder = done / 'runs/digits/export/qwix'
  monkeypatch.chdir(folder)
  monkeypatch.syspath_prepend(folder)

  class Network(whole_runs.Smallest):
    num_classes: int = 10

    def __call__(self, images):
      return super().__call__(images, train=False)

  names = {'Network': Network, 'images': np.ones((2, 8, 8, 1), np.float32)}
  exec(program('from load_qwix'), names)
  assert names['logits'].shape == (2, 10) and len(names['rules']) == 3


def test_the_server_answers(done, tmp_path):
  folder, port = done / 'runs/digits/export/stablehlo', whole_runs.free_port()
  (asked,) = re.findall(r'`(curl [^`]*)`', PAGE)
  (folder / 'serve.py').write_text(program('# serve.py').replace('8000', str(port)))
  images = np.zeros((3, 8, 8, 1), np.uint8)
  np.save(folder / 'image.npy', images)
  server = subprocess.Popen([sys.executable, 'serve.py'], cwd=folder)
  try:
    address = f'http://localhost:{port}'
    assert asked == 'curl --data-binary @image.npy localhost:8000'
    answer = json.loads(asked_for(address, (folder / 'image.npy').read_bytes()))
  finally:
    server.kill()
    server.wait()
  loader = loading.import_loader(folder / 'load_stablehlo.py')
  logits = loader.load(folder / 'model.stablehlo')(images)
  assert answer == np.argmax(logits, -1).tolist()


def asked_for(address, body):
  """Posts until the server listens, and returns its answer."""
  for _ in range(600):
    try:
      with urllib.request.urlopen(address, body) as answer:
        return answer.read()
    except urllib.error.URLError:
      time.sleep(0.1)
  raise AssertionError(f'nothing listens at {address}')


def test_the_reader_decodes_to_a_file(done, tmp_path):
  folder = done / 'runs/digits/export/safetensors'
  line = 'python load_safetensors.py FILE OUT.npz'
  assert line in program('"""Decodes an exported file')
  line = line.replace('FILE', 'model.safetensors').replace('OUT', str(tmp_path / 'out'))
  _, *arguments = shlex.split(line)
  subprocess.run([sys.executable, *arguments], cwd=folder, check=True)
  assert np.load(tmp_path / 'out.npz')['hidden/kernel'].dtype == np.float32


def files_in(folder):
  return [path for path in folder.rglob('*') if path.is_file()]


def test_a_network_that_cannot_be_traced_without_its_dataset(folder, tmp_path):
  run = tmp_path / 'runs/digits'
  shutil.copytree(folder / 'runs/digits', run, ignore=shutil.ignore_patterns('export'))
  config = json.loads((run / 'config.json').read_text())
  config['input']['data_dir'] = '/proc/nowhere'
  (run / 'config.json').write_text(json.dumps(config))
  result = command(COMMANDS[1], tmp_path)
  assert result.returncode == 2
  (line,) = result.stderr.strip().splitlines()
  assert line.startswith('error: ') and '/proc/nowhere' in line
  assert not (run / 'export').exists()


@pytest.mark.parametrize('limit', [1_000, 10_000])  # of the weights, of examples
def test_a_disk_that_is_full(folder, limit, tmp_path):
  line = f'{COMMANDS[1]} --out={tmp_path}/export'
  result = command(
    line, folder, prepare=functools.partial(child_functions.limit_files, limit)
  )
  assert result.returncode == 2
  (line,) = result.stderr.strip().splitlines()
  assert (
    line == f"error: cannot write to '{tmp_path}/export/safetensors': File too large"
  )
  assert files_in(tmp_path) == []


def test_a_disk_that_is_full_for_another_process(tmp_path):
  script = tmp_path / 'script.py'
  script.write_text('raise OSError(28, "No space left on device")')
  with pytest.raises(OSError, match='script.py: .*No space left on device'):
    loading.run(script, tmp_path)
