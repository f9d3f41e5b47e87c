"""Overview of a network: its layers and their costs, without training it."""

import collections
import dataclasses
import functools
from types import MappingProxyType
from typing import Any

import jax
import ml_collections
import numpy as np

from fliqs_jax.layers.coverage import Coverage
from fliqs_jax.layers.layer import Layer
from fliqs_jax.numerics import formats as formats_lib
from fliqs_jax.reporting import notebook, terminal, units
from fliqs_jax.runs import builders, network, targets
from fliqs_jax.runs import setup as setup_lib
from fliqs_jax.search import assignments, devices, options
from fliqs_jax.search.budget import cost_range
from fliqs_jax.search.space import UNQUANTIZED


@dataclasses.dataclass(frozen=True, repr=False)
class Overview:
  """Layers of a network and its costs in given formats.

  Attributes:
    model: name of the network.
    cost_model: name of the cost.
    cost_unit: its unit.
    format: what the formats are called.
    architecture: the fixed one, `{decision: size}`.
    total: the network's cost.
    params: parameters that inference uses.
    training_params: those of training alone, `{name of a module: parameters}`.
    macs: multiply-accumulates of an example, of the layers that have formats.
    layers: a dict for each layer: `name` (its path), `kind` (its operator), `macs`,
      `params`, `weights` and `activations` (its formats), and `cost`.
    uniform_costs: of the network in each format that a search would have, by format.
    budgets: what a search keeps within, dicts of `cost_model`, `cost_unit`, `limit`,
      and `low` and `high`, the costs that it reaches. The first is the target.
    device: formats that a device multiplies natively, from `describe_device`; None
      where none was asked for.
    coverage: which layers have formats, and why others have none; None for networks
      whose layers are all known.
  """

  model: str
  cost_model: str
  cost_unit: str
  format: str
  architecture: dict[str, int]
  total: float
  params: int
  training_params: dict[str, int]
  macs: int
  layers: list[dict[str, Any]]
  uniform_costs: dict[str, float]
  budgets: list[dict[str, Any]]
  device: dict[str, Any] | None
  coverage: Coverage | None = None

  def to_json(self) -> dict[str, Any]:
    """Returns the overview as JSON has it, without the coverage."""
    content = dataclasses.asdict(dataclasses.replace(self, coverage=None))
    del content['coverage']
    return content

  def __repr__(self) -> str:
    return terminal.to_text(self._tables(), self._lines())

  def _repr_html_(self) -> str:
    return notebook.to_html(self._tables(), self._lines())

  def _tables(self):
    layers = {layer['name']: layer for layer in self.layers}
    tables = [terminal.layer_table(layers, self.total, confidence={})]
    if self.architecture:
      tables.append(terminal.architecture_table(self.architecture, policy={}))
    return tables

  def _lines(self):
    lines = [
      f'{self.model}: {self.params:,} parameters, {self.macs:,} MACs',
      *(
        f'In training alone: {name}, {count:,} parameters'
        for name, count in self.training_params.items()
      ),
      f'Cost in {self.format}: {self._unit().text(self.total)} ({self.cost_model})',
      *self._budget_lines(),
    ]
    if self.device:
      lines.append(_native_formats(self.device))
    return lines + (self.coverage.remarks() if self.coverage else [])

  def _budget_lines(self):
    if not self.budgets:
      return []
    target, *caps = self.budgets
    unit = self._unit()
    lines = [
      terminal.uniform_line(self.uniform_costs, unit),
      f'The search reaches {_reached(target, unit)}; its target is '
      f'{unit.text(target["limit"])}',
    ]
    for cap in caps:
      unit = units.choose([cap['limit']], cap['cost_unit'])
      lines.append(
        f'Its cap is {unit.text(cap["limit"])} ({cap["cost_model"]}), of which it '
        f'reaches {_reached(cap, unit)}'
      )
    return lines

  def _unit(self):
    """Returns the unit of the network's cost and of the target."""
    limits = [budget['limit'] for budget in self.budgets[:1]]
    return units.choose([self.total, *limits], self.cost_unit)


def _reached(budget, unit):
  return f'{unit.scale(budget["low"]):.6g} to {unit.text(budget["high"])}'


def describe(
  config: ml_collections.ConfigDict,
  assignment: str | assignments.Assignment,
  label: str,
  architecture: network.Architecture = MappingProxyType({}),
  own: network.Network | None = None,
  device: str | None = None,
) -> Overview:
  """Returns the overview of a config's network, or of a user's own.

  Args:
    config: resolved.
    assignment: the formats.
    label: what to call them.
    architecture: empty for the standard one.
    own: None for the network that the config names.
    device: whose native formats are listed; None for none.

  Raises:
    ConfigError: where the config, the formats or the device are unusable.
  """
  setup = setup_lib.build(config, 1, assignment, own, architecture)
  used, unused = _parameters(setup)
  layers = setup.space.layers
  fixed = np.zeros(0, np.int32)
  formats = setup.space.formats_of(fixed)
  costs = setup.cost_model.per_layer(setup.space, fixed)
  uniform_costs, budgets = {}, []
  if config.mode == 'search':
    searched = layers if own else network.searched_layers(config, setup.architecture)
    standard = setup.standard_layers
    uniform_costs, budgets = _reachable_costs(config, standard, searched)
  return Overview(
    model=config.model.name,
    cost_model=setup.cost_model.name,
    cost_unit=setup.cost_model.unit,
    format=label,
    architecture=dict(setup.architecture),
    total=float(setup.cost_model.total(costs)),
    params=sum(used.values()),
    training_params=dict(unused),
    macs=sum(layer.macs for layer in layers),
    layers=[
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
    uniform_costs=uniform_costs,
    budgets=budgets,
    device=describe_device(device) if device else None,
  )


def describe_device(name: str) -> dict[str, Any]:
  """Returns what a device multiplies natively, ready for JSON.

  `native` has formats, each with itself, and `pairs` those of weights' and activations'
  formats that differ, of the fast ones and bf16; both with their rates.

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
  fast = devices.fast_formats(name, required=False)
  pairs = [pair for pair in devices.native_pairs(name, fast) if ':' in pair]
  return {
    'name': name,
    'native': {format_name: rates[format_name] / 1e12 for format_name in by_rate},
    'pairs': {
      pair: devices.rate(device, *options.split(pair)) / 1e12 for pair in pairs
    },
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
  is_array = lambda leaf: isinstance(leaf, jax.Array)  # outputs may be of any class
  outputs = lambda *args: list(filter(is_array, jax.tree.leaves(apply(*args))))
  jaxpr = jax.make_jaxpr(outputs)(variables, *example.args).jaxpr
  read = {id(v) for eqn in jaxpr.eqns for v in eqn.invars} | set(map(id, jaxpr.outvars))
  counts = collections.Counter(), collections.Counter()
  leaves = jax.tree.leaves_with_path(variables)
  for (path, leaf), variable in zip(leaves, jaxpr.invars):
    if path[0].key == 'params':
      counts[id(variable) not in read][path[1].key] += leaf.size
  return counts


def _native_formats(device):
  formats, pairs = (
    ', '.join(f'{name} {rate:g}' for name, rate in device[field].items()) or 'none'
    for field in ('native', 'pairs')
  )
  return (
    f'{device["name"]} multiplies natively, in 10¹² operations a second: {formats}; '
    'search.formats=device takes those that are faster than bf16, and bf16. '
    f'Pairs of different ones, weights first: {pairs}; '
    'search.weights_and_activations=pairs adds them; any format can be stored'
  )


def _reachable_costs(
  config: ml_collections.ConfigDict,
  layers: tuple[Layer, ...],
  searched: tuple[Layer, ...],
) -> tuple[dict[str, float], list[dict[str, Any]]]:
  """Returns the costs of uniform models, and the budgets with what a search reaches.

  Args:
    config: resolved.
    layers: of the standard network.
    searched: those that the search is over.
  """
  cost_model = builders.build_cost_model(config)
  space = builders.build_space(config, searched)
  uniform = {
    name: cost_model.uniform(layers, name)
    for name in options.parse(config.search.formats)
  }
  limits = [(cost_model, targets.limit(config.search, cost_model, layers))]
  limits += [
    (cap.cost_model, cap.limit)
    for cap in builders.search_caps(config, cost_model, layers)
  ]
  budgets = []
  for model, limit in limits:
    low, high = map(float, cost_range(space, model))
    budgets.append(
      {
        'cost_model': model.name,
        'cost_unit': model.unit,
        'limit': float(limit),
        'low': low,
        'high': high,
      }
    )
  return uniform, budgets
