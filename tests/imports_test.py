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


def test_core_imports():
  modules = ', '.join(['fliqs_jax', *(f'fliqs_jax.{name}' for name in CORE)])
  script = f'import sys, {modules}\nprint([m for m in {FORBIDDEN} if m in sys.modules])'
  result = subprocess.run(
    [sys.executable, '-c', script], capture_output=True, text=True, check=True
  )
  assert result.stdout.strip() == '[]'
