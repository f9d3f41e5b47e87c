"""Imports run one way through the folders, and the core does no input or output."""

import ast
import itertools
import subprocess
import sys

from conftest import ROOT
from package_structure import Source
import pytest

# From the bottom to the top. A module imports from its own folder and from those of
# rows below; folders of one row know nothing of each other.
ROWS = (
  ('numerics',),
  ('layers',),
  ('linen', 'nnx'),
  ('search', 'models'),
  ('training', 'data'),
  ('runs',),
  ('reporting', 'exporting'),
  ('api',),
  ('',),  # the commands, beside the folders
)
HEIGHT = {folder: height for height, row in enumerate(ROWS) for folder in row}
ERRORS = 'fliqs_jax.errors'  # below all of them, though in no folder

# Folders that read or write, and may import any library.
WITH_IO = ('data', 'runs', 'reporting', 'exporting', 'api', '')
LIBRARIES = sys.stdlib_module_names | {
  'fliqs_jax', 'jax', 'flax', 'optax', 'chex', 'etils', 'ml_collections', 'numpy',
  'scipy', 'opt_einsum',
}  # fmt: skip
# What the core has no use for, although it is of these libraries.
IO_MODULES = ('etils.epath', 'pathlib', 'shutil', 'socket', 'subprocess', 'tempfile')
IO_CALLS = (
  'open', 'read_bytes', 'read_text', 'write_bytes', 'write_text', 'mkdir', 'unlink',
)  # fmt: skip

FOREIGN = (
  'tensorflow',
  'tensorflow_datasets',
  'grain',
  'clu',
  'orbax.checkpoint',
  'matplotlib',
)


@pytest.fixture(scope='module')
def source():
  return Source.read(ROOT / 'fliqs_jax')


def violations(source):
  """Yields a line for each import or call that is against the rules."""
  for module in source.trees:
    folder = source.folder(module)
    if folder not in HEIGHT:
      yield f'{module}: the folder {folder!r} has no place among {list(HEIGHT)}'
      continue
    for other in sorted(source.inner_imports(module) - {ERRORS}):
      above = HEIGHT[source.folder(other)] >= HEIGHT[folder]
      if module == ERRORS or (source.folder(other) != folder and above):
        yield f'{module} imports {other}'
    if module == ERRORS or folder not in WITH_IO:
      yield from io_violations(source, module)


def io_violations(source, module):
  for name in sorted(source.imports(module)):
    library = name.split('.')[0]
    framework = library == 'flax' and source.folder(module) == 'numerics'
    if name.startswith(IO_MODULES) or library not in LIBRARIES or framework:
      yield f'{module} imports {name}'
  for node in ast.walk(source.trees[module]):
    if isinstance(node, ast.Call):
      called = getattr(node.func, 'attr', getattr(node.func, 'id', None))
      if called in IO_CALLS:
        yield f'{module} calls {called}'


def test_imports_run_one_way_and_the_core_does_no_io(source):
  assert list(violations(source)) == []


def test_no_modules_import_each_other(source):
  assert source.longest_chain()  # raises where there is a cycle


@pytest.mark.parametrize(
  'module, text, expected',
  [
    ('search.space', 'from fliqs_jax.linen import discovery', None),
    ('search.space', 'from fliqs_jax.search import budget', None),
    ('search.space', 'from fliqs_jax.errors import ConfigError', None),
    ('search.space', 'import scipy.optimize, math', None),
    ('data.pipeline', 'import grain\nopen("a")', None),
    ('sweep', 'from fliqs_jax.runs import loop', None),
    ('search.space', 'from fliqs_jax.runs import loop', 'imports fliqs_jax.runs.loop'),
    ('search.space', 'import fliqs_jax.runs.loop', 'imports fliqs_jax.runs.loop'),
    ('search.space', 'def f():\n  from fliqs_jax.runs.loop import run', 'runs.loop'),
    ('search.space', 'from fliqs_jax import models', 'imports fliqs_jax.models'),
    ('runs.result', 'from fliqs_jax import sweep', 'imports fliqs_jax.sweep'),
    ('numerics.formats', 'import jax.numpy as jnp\nimport clu', 'imports clu'),
    ('numerics.formats', 'import flax', 'imports flax'),
    ('linen.discovery', 'import flax', None),
    ('numerics.formats', 'from etils import epath', 'imports etils.epath'),
    ('numerics.formats', 'x = open("a")', 'calls open'),
    ('training.steps', 'def f(path):\n  return path.read_text()', 'calls read_text'),
    ('errors', 'from fliqs_jax.numerics import formats', 'numerics.formats'),
    ('errors', 'import matplotlib', 'imports matplotlib'),
    ('gadgets.a', '', "the folder 'gadgets' has no place"),
  ],
)
def test_a_rule_that_is_broken_is_reported(module, text, expected):
  others = ('linen.discovery', 'search.budget', 'runs.loop', 'numerics.formats')
  sources = {f'fliqs_jax.{other}': '' for other in (*others, 'models', 'models.deit')}
  sources |= {'fliqs_jax': '', ERRORS: '', 'fliqs_jax.sweep': ''}
  found = list(violations(Source('fliqs_jax', sources | {f'fliqs_jax.{module}': text})))
  if expected is None:
    assert found == []
  else:
    (line,) = found
    assert line.startswith(f'fliqs_jax.{module}') and expected in line


def test_a_cycle_is_reported():
  sources = {
    'fliqs_jax.search.a': 'from fliqs_jax.search import b',
    'fliqs_jax.search.b': 'def f():\n  import fliqs_jax.search.a',
  }
  with pytest.raises(ValueError, match='an import cycle: .*a -> .*b -> .*a'):
    Source('fliqs_jax', sources).longest_chain()


def imported(modules, setup=''):
  """Returns which of `FOREIGN` a new interpreter has after it imported modules."""
  script = f'import sys\n{setup}\nimport {", ".join(modules)}\n'
  script += f'print(*(name for name in {FOREIGN} if name in sys.modules))'
  result = subprocess.run(
    [sys.executable, '-c', script], capture_output=True, text=True, check=True
  )
  return result.stdout.split()


def test_a_new_interpreter_imports_the_core_alone(source):
  rows = itertools.chain.from_iterable(ROWS)
  core = [folder for folder in rows if folder not in WITH_IO]
  modules = [name for name in source.trees if source.folder(name) in core]
  assert len(modules) > 30
  # Without the package's own public names, some of which stand for what is above.
  folder = str(ROOT / 'fliqs_jax')
  bare = 'package = sys.modules["fliqs_jax"] = type(sys)("fliqs_jax")\n'
  bare += f'package.__path__ = [{folder!r}]'
  assert imported(modules, bare) == []


@pytest.mark.parametrize('module', ['', '.runs.config', '.runs.network', '.runs.setup'])
def test_what_a_config_means_is_found_without_foreign_libraries(module):
  assert imported([f'fliqs_jax{module}']) == []


def test_whoever_reads_a_run_does_without_tensorflow():
  assert imported(['fliqs_jax.reporting.page']) == ['matplotlib']
  assert not {'tensorflow', 'clu'} & set(imported(['fliqs_jax.analysis']))
