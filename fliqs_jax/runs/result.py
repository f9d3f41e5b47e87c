"""Results of runs: the file `search_result.json`, which is enough to reuse one."""

from collections.abc import Mapping
import importlib.metadata
import json
import os
from typing import Any

from etils import epath
import jax
import ml_collections
import numpy as np

from fliqs_jax.errors import ConfigError
from fliqs_jax.runs import files
from fliqs_jax.runs.setup import Setup
from fliqs_jax.search import assignments, options
from fliqs_jax.search import space as search_space
from fliqs_jax.search.quantities import counted_bits

RESULT_FILE = 'search_result.json'
EVAL_FILE = 'eval_result.json'

_PACKAGES = ('fliqs_jax', 'jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy')


def make_result(
  setup: Setup,
  choices: np.ndarray,
  policy: np.ndarray | None,
  evaluation: Mapping[str, float],
) -> dict[str, Any]:
  """Returns the result of a finished run, ready for JSON.

  Args:
    setup: of the run.
    choices: int32[N], the final ones.
    policy: float[N, K], the probabilities when the choices were made; None where
      formats were fixed.
    evaluation: `loss`, `num_examples`, and `accuracy` or `bits_per_byte`.
  """
  config, space, cost_model = setup.config, setup.space, setup.cost_model
  searched = policy is not None
  compared = options.parse(config.search.formats) if searched else ()
  return {
    'model': config.model.name,
    'dataset': config.dataset,
    'cost_model': cost_model.name,
    'cost_unit': cost_model.unit,
    'target': float(setup.target) if searched else None,
    'cost': float(cost_model(space, choices)),
    'caps': [
      {
        'cost_model': cap.cost_model.name,
        'cost_unit': cap.cost_model.unit,
        'limit': float(cap.limit),
        'cost': float(cap.cost_model(space, choices)),
      }
      for cap in setup.caps
    ],
    'seed': config.seed,
    'steps': config.num_steps,
    'formats': space.formats_of(choices),
    'layers': _layers(space, cost_model, choices, compared),
    'architecture': setup.architecture | space.architecture_of(choices),
    'eval': dict(evaluation),
    'uniform_costs': {
      name: cost_model.uniform(setup.standard_layers, name) for name in compared
    },
    'policy': policy_by_name(space, policy),
    'versions': {name: importlib.metadata.version(name) for name in _PACKAGES}
    | {'platform': jax.default_backend()},
    'config': config_to_json(config),
  }


def _layers(space, cost_model, choices, compared):
  """Kind and cost of each layer, and its costs in uniform models, by path."""
  layers, no_choices = space.layers_of(choices), np.zeros(0, np.int32)
  decisions = _decisions_by_layer(space)
  found = space.formats_of(choices)
  fixed = search_space.fixed_space(layers, found)
  costs = cost_model.per_layer(fixed, no_choices)
  uniform = {
    name: cost_model.per_layer(search_space.uniform_space(layers, name), no_choices)
    for name in compared
  }
  return {
    layer.path: {
      'kind': layer.kind,
      'macs': layer.macs,
      'params': layer.params,
      'decisions': decisions[layer.path],
      'bits': {
        operand: counted_bits(name) for operand, name in found[layer.path].items()
      },
      'cost': float(costs[i]),
      'uniform_costs': {name: float(values[i]) for name, values in uniform.items()},
    }
    for i, layer in enumerate(layers)
  }


def _decisions_by_layer(
  space: search_space.SearchSpace,
) -> dict[str, dict[str, str | None]]:
  """Returns `{path: {operand: decision}}`; None where the operand's format is fixed."""

  def name(assigned):
    return None if isinstance(assigned, str) else space.decisions[assigned].name

  return {
    layer.path: {'weights': name(weights), 'activations': name(activations)}
    for layer, weights, activations in zip(
      space.layers, space.weights, space.activations
    )
  }


def policy_by_name(
  space: search_space.SearchSpace, policy: np.ndarray | None
) -> dict[str, dict[str, float]]:
  """Returns `{decision: {format: probability}}` of a policy float[N, K], or None."""
  if policy is None:
    return {}
  return {
    decision.name: {name: float(p) for name, p in zip(decision.options, probabilities)}
    for decision, probabilities in zip(space.decisions, policy)
  }


def config_to_json(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """Returns the fields of a config as JSON has them, tuples as lists."""
  return json.loads(json.dumps(config.to_dict()))


def without_layers(config: dict[str, Any]) -> dict[str, Any]:
  """Returns the config of a run without layers of its network.

  The model of `fliqs_jax.search` listed them before they had a file of their own.
  """
  model = config.get('model')
  if not isinstance(model, dict) or 'layers' not in model:
    return config
  return config | {'model': {k: v for k, v in model.items() if k != 'layers'}}


def write_json(path: epath.Path, content: Any) -> None:
  """Writes a JSON file that is there whole or not at all."""
  temporary = path.parent / f'.{path.name}.tmp'
  temporary.write_text(json.dumps(content, indent=2) + '\n')
  temporary.replace(path)


def read_result(path: os.PathLike | str) -> dict[str, Any]:
  """Returns the content of a result file.

  Raises:
    ConfigError: where it is missing, damaged, or not a result; one line for each
      problem.
  """
  content = files.read_json(path)
  if 'formats' not in content:
    raise ConfigError(f'{str(path)!r} holds no "formats": expected a {RESULT_FILE}')
  if isinstance(content.get('config'), dict):
    content['config'] = without_layers(content['config'])
  return content | {'formats': assignments.parse(content['formats'], str(path))}
