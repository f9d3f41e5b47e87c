"""The documentation builds strictly, is whole, and says what the code does."""

import doctest
import importlib.util
import os
import re
import subprocess
import sys

from conftest import ROOT
from flax import linen as nn
import griffe
import ml_collections
import numpy as np
import pytest
import references

import fliqs_jax
from fliqs_jax.numerics import formats
from fliqs_jax.runs.config import default_config
from fliqs_jax.search import devices

PAGES = sorted((ROOT / 'docs').rglob('*.md'))


@pytest.fixture(scope='module')
def site(tmp_path_factory):
  """The folder of the site, built as docs/contributing.md says."""
  folder = tmp_path_factory.mktemp('site')
  command = ['mkdocs', 'build', '--strict', '--config-file=docs/site/mkdocs.yml']
  result = subprocess.run(
    [sys.executable, '-m', *command, f'--site-dir={folder}'],
    cwd=ROOT,
    env={**os.environ, 'NO_MKDOCS_2_WARNING': '1'},
    capture_output=True,
    text=True,
  )
  assert result.returncode == 0, result.stderr
  return folder


def test_every_page_is_in_the_site(site):
  for page in PAGES:
    name = page.relative_to(ROOT / 'docs').with_suffix('')
    place = name.parent if name.name == 'index' else name
    assert (site / place / 'index.html').is_file()
  assert 'Which numeric format should each layer' in (site / 'index.html').read_text()


@pytest.fixture(scope='module')
def hooks():
  """The module `docs/site/hooks.py`."""
  path = ROOT / 'docs/site/hooks.py'
  spec = importlib.util.spec_from_file_location('hooks', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.mark.parametrize(
  'page, link, expected',
  [
    ('budget.md', 'costs.md#a-cap', 'costs.md#a-cap'),
    ('budget.md', '../README.md#read-on', 'index.md#read-on'),
    ('budget.md', '../configs/resnet18.py', 'https://x/blob/main/configs/resnet18.py'),
    ('reference/api.md', '../costs.md', '../costs.md'),
    ('index.md', 'docs/costs.md', 'costs.md'),
    ('index.md', 'colabs', 'https://x/tree/main/colabs'),
    ('index.md', 'https://elsewhere/a', 'https://elsewhere/a'),
    ('index.md', '#read-on', '#read-on'),
  ],
)
def test_links_lead_to_pages_or_to_the_repository(hooks, page, link, expected, caplog):
  assert hooks.follow(f'[a]({link}), `[a](b)`', page, 'https://x') == (
    f'[a]({expected}), `[a](b)`'
  )
  assert not caplog.records


def test_a_link_to_nothing_is_a_warning(hooks, caplog):
  hooks.follow('[a](../configs/none.py)', 'budget.md', 'https://x')
  assert caplog.messages == [
    'docs/budget.md links to ../configs/none.py, which does not exist.'
  ]


@pytest.fixture(scope='module')
def source():
  """The package as griffe reads it, without importing it."""
  return griffe.load('fliqs_jax', search_paths=[ROOT], try_relative_path=False)


def public(folder):
  """Yields what a folder's facade names, or, without one, what its modules define."""
  if folder.exports:
    yield from (folder[name] for name in folder.exports)
    return
  for member in folder.members.values():
    if member.is_public and not member.is_alias:
      if member.is_module:
        yield from public(member)
      elif member.is_function or member.is_class:
        yield member


def test_every_public_name_is_in_the_reference_and_has_a_docstring(site, source):
  pages = '\n'.join(p.read_text() for p in (site / 'reference').rglob('*.html'))
  folders = [module for module in source.modules.values() if module.is_init_module]
  members = []
  for folder in folders:
    members += [folder, *public(folder)]
  for member in members:
    assert f'id="{member.path}"' in pages, member.path
    assert member.has_docstring, member.path


def rows(page, heading):
  """Returns the cells of the tables in a section of a page."""
  text = (ROOT / 'docs' / page).read_text()
  section = text.split(f'# {heading}\n', 1)[1].split('\n#', 1)[0]
  lines = [line for line in section.splitlines() if line.startswith('| `')]
  return [[cell.strip() for cell in line.strip()[1:-1].split('|')] for line in lines]


def test_the_table_of_formats():
  def row(name):
    format = formats.get_format(name)
    lowest, highest = int(format.exponent_min), int(format.exponent_max)
    is_integer = name in formats.INTEGER_NAMES
    smallest = lowest - int(format.mantissa_bits)
    largest = float(np.finfo(np.float32).max if name == 'float32' else format.max)
    dtype = references.ML_DTYPES.get(name)
    return [
      f'`{name}`',
      f'{format.bits}',
      f'{format.mantissa_bits}',
      'none' if is_integer else f'{lowest} … {highest}',
      '1' if is_integer else f'2^{smallest}',
      f'{largest:.6g}',
      f'{format.clip:.3f}' if format.clip else 'not scaled',
      *([f'`{dtype.__name__}`'] if dtype else []),
    ]

  table = rows('formats.md', 'Numeric formats')
  assert len(table) == len(formats.NAMES)
  for name, cells in zip(formats.NAMES, table):
    expected = row(name)
    assert cells[: len(expected)] == expected


def test_the_table_of_block_formats():
  table = rows('formats.md', 'Block formats')
  assert [cells[0].strip('`') for cells in table] == list(formats.BLOCK_NAMES)
  for name, element, size, scale, bits, *_ in table:
    format = formats.find_format(name.strip('`'))
    assert element == f'`{format.element}`'
    assert (int(size), scale.lower()) == (format.block.size, format.block.scale)
    assert float(bits) == format.bits_per_value


def test_where_formats_run():
  def native(name):
    found = [d for d, row in devices.DEVICES.items() if devices.is_native(row, name)]
    return ', '.join(f'`{device}`' for device in found) or 'emulated'

  table = rows('formats.md', 'Numeric formats') + rows('formats.md', 'Block formats')
  for cells in table:
    name = cells[0].strip('`')
    if name not in ('bf16', 'float32'):
      assert cells[-1] == native(name)


def test_the_table_of_devices():
  table = rows('costs.md', 'Roofline')
  # Behind the heading, and before a table of costs.
  table = [cells for cells in table if len(cells) == 9][1:]
  assert [cells[0].split('`')[1] for cells in table] == list(devices.DEVICES)
  for (_, *rates, bandwidth, _), device in zip(table, devices.DEVICES.values()):
    for name, cell in zip(devices.TYPE_BITS, rates, strict=True):
      assert cell == (f'{device.peaks[name] / 1e12:g}' if name in device.peaks else '')
    assert float(bandwidth) == device.bandwidth / 1e9


def test_the_table_of_search_spaces():
  table = dict(rows('formats.md', 'Search spaces'))
  assert {
    name.strip('`'): tuple(re.findall(r'`(\w+)`', members))
    for name, members in table.items()
  } == formats.SPACES


def test_the_tables_of_fields():
  def flat(config, prefix=''):
    for name, value in config.items():
      if isinstance(value, ml_collections.ConfigDict):
        yield from flat(value, f'{prefix}{name}.')
      else:
        yield f'{prefix}{name}', value

  text = (ROOT / 'docs/configuration.md').read_text()
  table = dict(re.findall(r'^\| `([\w.]+)` \| (.*?) \| ', text, re.MULTILINE))
  fields = dict(flat(default_config()))
  assert set(table) == set(fields)
  for name, value in fields.items():
    if value is None:  # follows from others, or is none
      assert not table[name].startswith('`'), name
    else:
      assert table[name] == (f'`{value}`' if value != '' else 'empty'), name


class Network(nn.Module):
  """Two layers."""

  @nn.compact
  def __call__(self, x):
    x = nn.relu(nn.Conv(4, (3, 3), strides=2)(x))
    return nn.Dense(10)(x.reshape(len(x), -1))


def test_the_loop_of_your_own():
  names = {'Network': Network, 'example': np.ones((1, 8, 8, 1), np.float32)}
  page = (ROOT / 'docs/own_network.md').read_text()
  (code,) = re.findall(r'```python\n(import jax\n.*?)```', page, re.DOTALL)
  exec(code, names)
  assert names['outputs'].shape == (1, 10)
  assert set(names['updated']['quant_stats']) == {'Conv_0', 'Dense_0'}


EXAMPLES = [
  path.relative_to(ROOT)
  for path in sorted((ROOT / 'fliqs_jax').rglob('*.py'))
  if '>>>' in path.read_text()
]


@pytest.mark.parametrize('path', EXAMPLES, ids=str)
def test_examples_in_docstrings(path):
  module = importlib.import_module('.'.join(path.with_suffix('').parts))
  assert doctest.testmod(module).failed == 0


def pages():
  """Yields the name and the text of the README and of every page."""
  for path in (ROOT / 'README.md', *PAGES):
    yield path.relative_to(ROOT), path.read_text()


def test_names_of_code_in_the_pages_exist(source):
  for page, text in pages():
    for path in re.findall(r'\bfliqs_jax\.([A-Za-z]\w*(?:\.[A-Za-z]\w*)*)', text):
      if path not in fliqs_jax.__all__:
        try:
          source[path]
        except KeyError:
          raise AssertionError(f'{page} names fliqs_jax.{path}') from None


def test_files_in_the_pages_exist():
  folders = 'fliqs_jax|benchmarks|configs|launch|tests|docs|colabs'
  for page, text in pages():
    for name in re.findall(rf'\b((?:{folders})/[a-z0-9_./]*\w\.\w+)', text):
      assert (ROOT / name).is_file(), f'{page}: {name}'
