"""Parameters that are split over devices: the same search, on any split of them."""

import json
import subprocess
import sys

from conftest import ROOT
import numpy as np
import pytest

from fliqs_jax.runs.config import resolve
from fliqs_jax.runs.validation import validate

ON_EIGHT_DEVICES = """
import json, pathlib, sys
import jax
jax.config.update('jax_num_cpu_devices', 8)
from fliqs_jax.runs import loop
from fliqs_jax.runs.checkpoints import Checkpoints
from fliqs_jax.runs.config import complete
from fliqs_jax.runs.workdir import read_config

folder = pathlib.Path(sys.argv[1])
config = complete(read_config(folder))

class Stopped(Exception):
  pass

def largest_share(tree):
  # Of a matrix on one device.
  return max(
    leaf.addressable_shards[0].data.size / leaf.size
    for leaf in jax.tree.leaves(tree) if leaf.ndim > 1
  )

def run(name, fsdp, stop=False):
  config.fsdp = fsdp
  save, shares = Checkpoints.save, []

  def save_and_stop(checkpoints, state, batches):
    shares.append([
      largest_share((state.params, state.opt_state, state.averaged_params)),
      largest_share(state.controller),
    ])
    save(checkpoints, state, batches)
    if stop:
      raise Stopped

  Checkpoints.save = save_and_stop
  try:
    result = loop.run(config, folder / name)
  except Stopped:
    result = None
  finally:
    Checkpoints.save = save
  return result, shares[0]

results = {'whole': run('whole', 1), 'stopped': run('split', 4, stop=True)}
# It goes on where each parameter is split over all devices.
results['split'] = run('split', 8)
(folder / 'results.json').write_text(json.dumps(results))
"""


@pytest.fixture(scope='module')
def config(text_config):
  """A search of a decoder on Python's library, of 6 steps."""
  config = text_config.copy_and_resolve_references()
  config.model = {
    'name': 'decoder', 'width': 1.0, 'hidden_size': 16, 'depth': 1, 'num_heads': 2,
    'num_kv_heads': 1, 'head_size': 8, 'mlp_size': 32, 'remat': True,
  }  # fmt: skip
  config.num_steps, config.checkpoint_every, config.log_every = 6, 3, 3
  config.batch_size, config.eval_batch_size = 16, 64
  config.input.eval_split = 'test[:64]'
  return config


def test_same_search_on_any_split(config, tmp_path):
  (tmp_path / 'config.json').write_text(config.to_json())
  subprocess.run(
    [sys.executable, '-c', ON_EIGHT_DEVICES, tmp_path],
    check=True,
    cwd=ROOT,
    timeout=500,
  )
  results = json.loads((tmp_path / 'results.json').read_text())
  shares = {name: share for name, (_, share) in results.items()}
  assert shares == {'whole': [1, 1], 'stopped': [1 / 4, 1], 'split': [1 / 8, 1]}
  whole, split = results['whole'][0], results['split'][0]
  assert whole['formats'] == split['formats']
  for name, value in whole['eval'].items():
    assert split['eval'][name] == pytest.approx(value, rel=1e-4)
  lines = [
    [json.loads(line) for line in (tmp_path / name / 'history.jsonl').open()]
    for name in ('whole', 'split')
  ]
  for line, other in zip(*lines, strict=True):
    np.testing.assert_allclose(line['loss'], other['loss'], rtol=1e-4)
    np.testing.assert_allclose(line['cost'], other['cost'], rtol=1e-6)


@pytest.mark.parametrize(
  'changes, expected',
  [
    ({'fsdp': 3}, ['fsdp=3: expected a divisor of the 8 device(s)']),
    ({'fsdp': 0}, ['fsdp=0: expected a number above 0']),
  ],
)
def test_unusable_splits(config, changes, expected):
  config = config.copy_and_resolve_references()
  config.update(changes)
  assert validate(resolve(config), num_devices=8) == expected


def test_no_split_without_training(config):
  config = config.copy_and_resolve_references()
  config.update({'fsdp': 2, 'num_steps': 0, 'search': {'strategy': 'sensitivity'}})
  (problem,) = validate(resolve(config), num_devices=8)
  assert problem.startswith('fsdp=2: expected 1 with num_steps=0')
