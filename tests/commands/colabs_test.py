"""The notebooks run from first cell to last, and are committed with pictures."""

import os
import re
import subprocess
import sys

from conftest import ROOT
import nbclient
import nbformat
import numpy as np
import pytest

NOTEBOOKS = sorted((ROOT / 'colabs').glob('*.ipynb'))


def read(path):
  return nbformat.read(path, as_version=4)


def pictures(notebook):
  return [
    output
    for cell in notebook.cells
    for output in cell.get('outputs', [])
    if 'image/png' in output.get('data', {})
  ]


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_committed_whole(path):
  notebook = read(path)
  first, *_ = [cell.source for cell in notebook.cells if cell.cell_type == 'markdown']
  (code, *_) = [cell for cell in notebook.cells if cell.cell_type == 'code']
  assert f'colabs/{path.name})' in first and 'colab-badge' in first
  assert 'pip install' in code.source
  assert pictures(notebook)
  links = '\n'.join(cell.source for cell in notebook.cells)
  assert all(f'({other.name})' in links for other in NOTEBOOKS if other != path)


# What the first cell does in a new interpreter, where `shell` says what is there.
INSTALL = """
import sys
commands = []


def shell(command):
  commands.append(command)


sys.path.insert(0, '')
{source}
print(*commands, sep='\\n')
"""


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_a_clone_that_was_not_installed_is_installed(path, tmp_path):
  (_, cell, *_) = read(path).cells
  source = re.sub(r'^( *)[!%](.*)$', r'\1shell("\2")', cell.source, flags=re.M)
  # A clone's own folder is found as a namespace package, without any of its names.
  package = tmp_path / 'fliqs_jax' / 'fliqs_jax'
  package.mkdir(parents=True)
  (package / '__init__.py').write_text('')

  def commands():
    result = subprocess.run(
      [sys.executable, '-I', '-S', '-c', INSTALL.format(source=source)],
      cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return result.stdout.splitlines()

  _, pip = commands()
  assert pip == 'pip install --quiet ./fliqs_jax'
  (tmp_path / 'fliqs_jax.py').write_text('search = None')  # as if it were installed
  package.parent.rename(tmp_path / 'clone')
  assert ''.join(commands()) == ''


@pytest.mark.parametrize(
  'searched, uniform, answer',
  [
    # Of 100 examples each, the difference has a standard error of 3.1 to 6.4 points.
    (0.95, 0.70, 'Yes: the search is +25.0 points'),
    (0.70, 0.95, 'No: the search is -25.0 points'),
    (0.90, 0.88, 'This run cannot say: the search is +2.0 points'),
  ],
)
def test_the_first_search_says_what_its_own_run_shows(searched, uniform, answer):
  cells = read(ROOT / 'colabs' / 'first_search.ipynb').cells
  (source,) = (cell.source for cell in cells if 'def verdict' in cell.source)
  found, beside = (
    {'eval': {'accuracy': accuracy, 'num_examples': 100}, 'cost': cost}
    for accuracy, cost in ((searched, 9.0), (uniform, 10.0))
  )
  names = {'result': found, 'uniform': beside}
  exec(source, names)
  text = names['verdict'](found, beside)
  assert text.startswith(answer) and text.endswith('at 90.0% of its cost.')
  error = np.hypot(*(np.sqrt(a * (1 - a) / 100) for a in (searched, uniform)))
  assert f'a standard error of {100 * error:.1f},' in text


@pytest.mark.parametrize(
  'wins, losses, answer',
  [
    # Of 100 images; the standard errors of the differences are 3.2, 3.2 and 2.0 points.
    (10, 1, 'Yes: the search is +9.0 points'),
    (1, 10, 'No: the search is -9.0 points'),
    (3, 1, 'This run cannot say: the search is +2.0 points'),
  ],
)
def test_an_own_network_is_compared_image_by_image(wins, losses, answer):
  cells = read(ROOT / 'colabs' / 'own_network.ipynb').cells
  (source,) = (cell.source for cell in cells if 'def verdict' in cell.source)
  names = {'np': np}
  exec(source[: source.index('\nfound, ')], names)
  searched, uniform = np.ones(100, bool), np.ones(100, bool)
  uniform[:wins], searched[wins : wins + losses] = False, False
  text = names['verdict'](searched, uniform, 0.9)
  error = np.sqrt((wins + losses) / 100 - ((wins - losses) / 100) ** 2) / 10
  assert text.startswith(answer) and text.endswith('at 90.0% of its cost.')
  assert f'a standard error of {100 * error:.1f},' in text


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, data_dir, tmp_path, monkeypatch):
  # Its shell commands shall be those of this environment.
  programs = os.pathsep.join([os.path.dirname(sys.executable), os.environ['PATH']])
  monkeypatch.setenv('PATH', programs)
  monkeypatch.setenv('TFDS_DATA_DIR', str(data_dir))
  monkeypatch.setenv('IPYTHONDIR', str(tmp_path))
  notebook = read(path)
  for cell in notebook.cells:  # as it is, but for how much it trains
    cell.source = re.sub(r'num_steps=\d{3,}', 'num_steps=12', cell.source)
    small = f'--config={ROOT}/tests/one_block.py:digits'
    cell.source = cell.source.replace('--config=configs/resnet18.py:digits', small)
  expected = len(pictures(notebook))
  client = nbclient.NotebookClient(
    notebook, timeout=600, resources={'metadata': {'path': path.parent}}
  )
  client.execute()  # raises where a cell does
  assert len(pictures(notebook)) == expected
  text = str([cell.get('outputs') for cell in notebook.cells])
  assert 'error: ' not in text and 'Traceback' not in text
