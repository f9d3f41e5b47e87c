"""Workdirs of runs that nobody made, for those who read runs."""

import json

from conftest import load_config

from fliqs_jax.runs.config import resolve
from fliqs_jax.runs.result import RESULT_FILE, config_to_json
from fliqs_jax.runs.workdir import CONFIG_FILE, HISTORY_FILE

OPTIONS = ('int2', 'int4', 'e4m3', 'bf16')


def write_run(folder, names, mode='search', steps=(10, 20, 30), **fields):
  """Writes the workdir of a run that nobody made: layer `i` has format `i mod 4`."""
  config = load_config('resnet18', 'digits')
  config.update(mode=mode, num_steps=30, **fields.pop('config', {}))
  config = config_to_json(resolve(config))
  formats = {
    name: dict.fromkeys(('weights', 'activations'), OPTIONS[i % len(OPTIONS)])
    for i, name in enumerate(names)
  }
  policy = {
    name: dict.fromkeys(OPTIONS, 0.1) | {formats[name]['weights']: 0.7}
    for name in names
  }
  folder.mkdir()
  (folder / CONFIG_FILE).write_text(json.dumps(config))
  scalars = {'loss': 0.5, 'accuracy': 0.9, 'reward': 0.8, 'cost_ratio': 1.1}
  rows = [
    {'step': step, **scalars, 'policy': policy if mode == 'search' else {}}
    for step in steps
  ]
  (folder / HISTORY_FILE).write_text(''.join(json.dumps(row) + '\n' for row in rows))
  bits = {'int2': 2, 'int4': 4, 'e4m3': 8, 'bf16': 16}
  result = {
    'model': 'resnet18', 'dataset': 'digits', 'cost_model': 'bops', 'seed': 0,
    'cost_unit': 'GBOPs', 'target': 16.0 * len(names), 'steps': 30,
    'cost': float(sum(bits[f['weights']] ** 2 for f in formats.values())),
    'formats': formats, 'architecture': {}, 'versions': {'jax': '0.10'},
    'layers': {
      name: {
        'kind': 'conv', 'macs': 10**9, 'params': 9,
        'cost': float(bits[formats[name]['weights']] ** 2),
        'uniform_costs': {option: float(bits[option] ** 2) for option in OPTIONS},
        'decisions': dict.fromkeys(
          ('weights', 'activations'), name if mode == 'search' else None
        ),
      }
      for name in names
    },
    'eval': {'accuracy': 0.75, 'loss': 1.0, 'num_examples': 300},
    'uniform_costs': {o: float(bits[o] ** 2 * len(names)) for o in OPTIONS},
    'policy': policy if mode == 'search' else {}, 'config': config,
  }  # fmt: skip
  result |= fields
  (folder / RESULT_FILE).write_text(json.dumps(result))
  return folder
