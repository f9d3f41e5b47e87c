"""The core can be embedded elsewhere: it imports no data or logging library."""

import subprocess
import sys

CORE = (
    'architecture', 'formats', 'quantizers', 'layers', 'variants', 'discovery',
    'search_space',
    'devices', 'latency', 'cost_models', 'rewards', 'preprocessing',
    'controller', 'budget', 'train_state', 'meshes', 'objectives', 'steps', 'config',
    'models', 'networks', 'assembly',
    'marks', 'operands', 'searchable', 'tasks',
    'assignments', 'quality',
)  # fmt: skip
FORBIDDEN = (
  'tensorflow',
  'tensorflow_datasets',
  'grain',
  'clu',
  'orbax.checkpoint',
  'matplotlib',
)


def imported(names, among):
  """Which of some modules a new interpreter has after it imported others of ours."""
  modules = ', '.join(['fliqs_jax', *(f'fliqs_jax.{name}' for name in names)])
  script = f'import sys, {modules}\nprint([m for m in {among} if m in sys.modules])'
  result = subprocess.run(
    [sys.executable, '-c', script], capture_output=True, text=True, check=True
  )
  return result.stdout.strip()


def test_core_imports():
  assert imported(CORE, FORBIDDEN) == '[]'


def test_whoever_reads_a_run_does_without_tensorflow():
  assert imported(['report_page'], FORBIDDEN) == "['matplotlib']"
  assert imported(['analysis'], ('tensorflow', 'clu')) == '[]'
