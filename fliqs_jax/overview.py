"""Prints a network's layers, their MACs, parameters and costs, without training it.

    python -m fliqs_jax.overview --config=configs/resnet18.py --format=e4m3

The costs are those of the network with every layer in that format, or in the formats
of --config.formats. --json prints one JSON object instead of the table.
"""

import functools
import json
from types import MappingProxyType
from typing import Any

from absl import flags
import jax
import ml_collections
import numpy as np

from fliqs_jax import command_line
from fliqs_jax.reporting import terminal as display
from fliqs_jax.runs import assembly, networks
from fliqs_jax.runs import subnetwork as subnetworks
from fliqs_jax.search import assignments
from fliqs_jax.numerics import formats as formats_lib
from fliqs_jax.search.budget import cost_range
from fliqs_jax.errors import ConfigError
from fliqs_jax.runs.config import resolve

_CONFIG = command_line.define_config_flag()
_FORMAT = flags.DEFINE_string('format', None, 'Format of all layers (default: bf16).')
_JSON = flags.DEFINE_bool('json', False, 'Print one JSON object.')


def overview(
  config: ml_collections.ConfigDict,
  assignment: str | assignments.Assignment,
  label: str,
  architecture: networks.Architecture = MappingProxyType({}),
) -> dict[str, Any]:
  """Returns the layers and totals of a config's network, ready for JSON.

  Args:
    config: resolved.
    assignment: the formats.
    label: what to call them.
    architecture: empty for the standard one.
  """
  setup = assembly.build(config, 1, assignment, architecture=architecture)
  variables = jax.eval_shape(
    functools.partial(setup.model.init, **setup.example.kwargs),
    jax.random.key(0),
    *setup.example.args,
  )
  layers = setup.space.layers
  fixed = np.zeros(0, np.int32)
  formats = setup.space.formats_of(fixed)
  costs = setup.cost_model.per_layer(setup.space, fixed)
  return {
    'model': config.model.name,
    'cost_model': setup.cost_model.name,
    'cost_unit': setup.cost_model.unit,
    'format': label,
    'architecture': setup.architecture,
    'total': float(setup.cost_model.total(costs)),
    'params': sum(leaf.size for leaf in jax.tree.leaves(variables['params'])),
    'macs': sum(layer.macs for layer in layers),
    'layers': [
      {
        'name': layer.path,
        'kind': layer.kind,
        'macs': layer.macs,
        'params': layer.params,
        **formats[layer.path],
        'cost': float(cost),
      }
      for layer, cost in zip(layers, costs)
    ],
  }


def print_overview(config: ml_collections.ConfigDict, content: dict[str, Any]) -> None:
  """Prints an overview as a table, with what the search could reach."""
  architecture = content['architecture']
  layers = networks.discover_layers(
    config, networks.choose_architecture(config, architecture)
  )
  formats = {layer['name']: layer for layer in content['layers']}
  costs = np.array([layer['cost'] for layer in content['layers']])
  console = display.make_console()
  unit = content['cost_unit']
  lines = [
    f'{content["model"]}: {content["params"]:,} parameters, {content["macs"]:,} MACs',
    f'Cost in {content["format"]}: {content["total"]:.6g} {unit} '
    f'({content["cost_model"]})',
  ]
  if config.mode == 'search':
    cost_model = assembly.build_cost_model(config)
    standard_layers = networks.discover_layers(config)
    uniform = ', '.join(
      f'{name} {cost_model.uniform(standard_layers, name):.6g}'
      for name in formats_lib.parse_names(config.search.formats)
    )
    searched = networks.searched_layers(config, architecture)
    space = assembly.build_space(config, searched)
    low, high = cost_range(space, cost_model)
    lines += [
      f'Uniform models: {uniform} {unit}',
      f'The search reaches {low:.6g} to {high:.6g} {unit}; its target is '
      f'{assembly.search_target(config, standard_layers):.6g} {unit}',
    ]
    for cap in assembly.search_caps(config, standard_layers):
      low, high = cost_range(space, cap.cost_model)
      unit = cap.cost_model.unit
      lines.append(
        f'Its cap is {cap.limit:.6g} {unit} ({cap.cost_model.name}), of which it '
        f'reaches {low:.6g} to {high:.6g} {unit}'
      )
  table = display.layer_table(layers, formats, costs, content['total'], confidence={})
  console.print(table)
  if architecture:
    console.print(display.architecture_table(architecture, policy={}))
  for line in lines:
    console.print(line, markup=False)


def main(argv):
  """Prints the overview of the config's network."""
  del argv
  config = resolve(_CONFIG.value)
  if _FORMAT.value and config.formats:
    raise ConfigError('--format and --config.formats: expected one of the two')
  label = _FORMAT.value or config.formats or 'bf16'
  try:
    assignment = assignments.read(label)
    architecture = subnetworks.read_architecture(config)
  except ValueError as error:
    raise ConfigError(str(error)) from None
  content = overview(config, assignment, label, architecture)
  if _JSON.value:
    print(json.dumps(content))
  else:
    try:
      print_overview(config, content)
    except ValueError as error:  # a table of latencies without a searched format
      raise ConfigError(str(error)) from None


if __name__ == '__main__':
  command_line.run(main, required=('config',))
