"""The notebooks run from first cell to last, and are committed with pictures."""

import os
import re
import sys

from conftest import ROOT
import nbclient
import nbformat
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
