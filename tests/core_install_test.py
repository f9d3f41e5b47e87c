"""A search over own batches where only the core's requirements are installed."""

import configparser
import json
import subprocess
import sys

from conftest import ROOT

# What the other requirements are imported as, and what TensorFlow brings.
_ABSENT = (
  'tensorflow', 'tensorflow_datasets', 'tensorboard', 'keras', 'cv2', 'clu', 'grain',
  'array_record', 'sklearn',
)  # fmt: skip

_SEARCH = f"""
import json, sys
sys.modules.update(dict.fromkeys({_ABSENT!r}))  # whose import is an error then

from flax import linen as nn
import jax
import numpy as np
import fliqs_jax

jax.config.update('jax_disable_most_optimizations', True)


class Network(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.Dense(2)(nn.relu(nn.Dense(4)(x)))


batch = {{'image': np.eye(4, dtype=np.float32), 'label': np.arange(4) % 2}}
result = fliqs_jax.search(
  Network(), [batch], [batch], num_steps=2, num_samples=1, strategy='uniform',
  formats=['int4', 'int8'], workdir=sys.argv[1],
)
again = fliqs_jax.evaluate(Network(), [batch], sys.argv[1])
print(json.dumps([result.formats, result.eval, again]))
"""


def read_requirements():
  lines = (ROOT / 'requirements-core.txt').read_text().splitlines()
  return {line for line in lines if line and not line.startswith('#')}


def test_the_core_is_a_part_of_what_is_installed_by_default():
  config = configparser.ConfigParser()
  config.read(ROOT / 'setup.cfg')
  installed = set(config['options']['install_requires'].strip().splitlines())
  core = read_requirements()
  assert core < installed
  for name in ('tensorflow', 'opencv', 'grain', 'clu', 'scikit-learn', 'array_record'):
    assert not any(line.startswith(name) for line in core)


def test_own_batches_are_searched_and_evaluated_without_the_rest(tmp_path):
  process = subprocess.run(
    [sys.executable, '-c', _SEARCH, str(tmp_path / 'run')],
    capture_output=True,
    text=True,
  )
  assert process.returncode == 0, process.stderr
  formats, evaluation, again = json.loads(process.stdout.splitlines()[-1])
  assert {'Dense_0', 'Dense_1'} == set(formats)
  assert again['num_examples'] == evaluation['num_examples'] == 4
