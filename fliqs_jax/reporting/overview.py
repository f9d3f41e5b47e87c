"""Overview of a config's network: its layers and their costs, without training it."""

import collections
from collections.abc import Mapping
import functools
import json
from types import MappingProxyType
from typing import Any

import jax
import ml_collections
import numpy as np

from fliqs_jax.errors import ConfigError
from fliqs_jax.numerics import formats as formats_lib
from fliqs_jax.numerics.formats import parse_names
from fliqs_jax.reporting import terminal
from fliqs_jax.runs import builders, files, network, supernet
from fliqs_jax.runs import setup as setup_lib
from fliqs_jax.runs.config import resolve
from fliqs_jax.search import assignments, devices
from fliqs_jax.search.budget import cost_range
from fliqs_jax.search.space import UNQUANTIZED


def print_overview(
  config: ml_collections.ConfigDict,
  format_name: str | None,
  device_name: str | None,
  as_json: bool,
) -> None:
  """Prints a network's layers, as a table with what the search could reach.

  Args:
    config: unresolved.
    format_name: of all layers; None for the formats that the config names, else bf16.
    device_name: of a device whose formats are listed; None for none.
    as_json: print what `describe` returns instead.

  Raises:
    ConfigError: where the config, or a file that it names, is unusable.
  """
  config = resolve(config)
  if format_name and config.formats:
    raise ConfigError('--format and --config.formats: expected one of the two')
  label = format_name or config.formats or 'bf16'
  assignment = files.read_formats(label)
  architecture = supernet.read_architecture(config)
  content = describe(config, assignment, label, architecture)
  if device_name:
    content['device'] = describe_device(device_name)
  if as_json:
    print(json.dumps(content))
  else:
    print_table(config, content)


def describe(
  config: ml_collections.ConfigDict,
  assignment: str | assignments.Assignment,
  label: str,
  architecture: network.Architecture = MappingProxyType({}),
) -> dict[str, Any]:
  """Returns the layers and totals of a config's network, ready for JSON.

  Args:
    config: resolved.
    assignment: the formats.
    label: what to call them.
    architecture: empty for the standard one.
  """
  setup = setup_lib.build(config, 1, assignment, architecture=architecture)
  used, unused = _parameters(setup)
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
    'params': sum(used.values()),
    'training_params': unused,
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


def describe_device(name: str) -> dict[str, Any]:
  """Returns the formats that a device multiplies natively, ready for JSON.

  Raises:
    ConfigError: where there is no such device.
  """
  device = devices.get_device(name)
  native = [
    format_name
    for format_name in (*formats_lib.NAMES, *formats_lib.BLOCK_NAMES)
    if format_name != UNQUANTIZED and devices.is_native(device, format_name)
  ]
  rates = {format_name: devices.rate(device, format_name) for format_name in native}
  by_rate = sorted(native, key=rates.get, reverse=True)
  return {
    'name': name,
    'native': {format_name: rates[format_name] / 1e12 for format_name in by_rate},
    'unit': 'TFLOPS',
  }


def _parameters(setup):
  """Returns how many parameters inference uses, and those of training alone.

  Two dicts by the modules of the network, `{name: parameters}`.
  """
  model, example = setup.model, setup.example
  init = functools.partial(model.init, **example.kwargs)
  variables = jax.eval_shape(init, jax.random.key(0), *example.args)
  apply = functools.partial(model.apply, **example.kwargs)
  jaxpr = jax.make_jaxpr(apply)(variables, *example.args).jaxpr
  read = {id(v) for eqn in jaxpr.eqns for v in eqn.invars} | set(map(id, jaxpr.outvars))
  counts = collections.Counter(), collections.Counter()
  leaves = jax.tree.leaves_with_path(variables)
  for (path, leaf), variable in zip(leaves, jaxpr.invars):
    if path[0].key == 'params':
      counts[id(variable) not in read][path[1].key] += leaf.size
  return counts


def print_table(config: ml_collections.ConfigDict, content: Mapping[str, Any]) -> None:
  """Prints an overview as a table, with what the search could reach."""
  lines = [
    f'{content["model"]}: {content["params"]:,} parameters, {content["macs"]:,} MACs',
    *(
      f'In training alone: {name}, {count:,} parameters'
      for name, count in content['training_params'].items()
    ),
    f'Cost in {content["format"]}: {content["total"]:.6g} {content["cost_unit"]} '
    f'({content["cost_model"]})',
  ]
  if config.mode == 'search':
    lines += _reachable_costs(config, content['architecture'])
  layers = {layer['name']: layer for layer in content['layers']}
  console = terminal.make_console()
  console.print(terminal.layer_table(layers, content['total'], confidence={}))
  if content['architecture']:
    console.print(terminal.architecture_table(content['architecture'], policy={}))
  if 'device' in content:
    lines.append(_native_formats(content['device']))
  for line in lines:
    console.print(line, markup=False)


def _native_formats(device):
  rates = ', '.join(f'{name} {rate:g}' for name, rate in device['native'].items())
  return (
    f'{device["name"]} multiplies natively, in 10¹² operations a second: {rates}; '
    'search.formats=device takes those that are faster than bf16, and bf16'
  )


def _reachable_costs(config, architecture):
  """Returns lines on the costs of uniform models and on those that a search reaches."""
  cost_model = builders.build_cost_model(config)
  layers = network.discover_layers(config)
  space = builders.build_space(config, network.searched_layers(config, architecture))
  unit = cost_model.unit
  uniform = ', '.join(
    f'{name} {cost_model.uniform(layers, name):.6g}'
    for name in parse_names(config.search.formats)
  )
  low, high = cost_range(space, cost_model)
  lines = [
    f'Uniform models: {uniform} {unit}',
    f'The search reaches {low:.6g} to {high:.6g} {unit}; its target is '
    f'{builders.search_target(config, cost_model, layers):.6g} {unit}',
  ]
  for cap in builders.search_caps(config, cost_model, layers):
    low, high = cost_range(space, cap.cost_model)
    unit = cap.cost_model.unit
    lines.append(
      f'Its cap is {cap.limit:.6g} {unit} ({cap.cost_model.name}), of which it '
      f'reaches {low:.6g} to {high:.6g} {unit}'
    )
  return lines
