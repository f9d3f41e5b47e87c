"""Tables and lines that commands print on the terminal."""

from collections.abc import Iterable, Mapping, Sequence
import io
import sys
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fliqs_jax.reporting import quality_budget, sensitivities, units
from fliqs_jax.reporting.recorded_run import decisions_by_layer
from fliqs_jax.runs import exports, quality
from fliqs_jax.search import devices
from fliqs_jax.search.quantities import counted_bits
from fliqs_jax.search.space import OPERANDS


def make_console(file: io.StringIO | None = None) -> Console:
  """Returns the console for tables, as wide as the terminal; in a file, wide enough.

  Args:
    file: that it prints to; None for the standard output.
  """
  width = None if sys.stdout.isatty() else 120
  # Rich shows tables by itself in a kernel, which takes a text for what is printed.
  return Console(file=file, width=width, highlight=False, force_jupyter=False)


def to_text(tables: Iterable[Table], lines: Sequence[str]) -> str:
  """Returns tables and the lines below them as they are printed."""
  console = make_console(io.StringIO())
  for table in tables:
    console.print(table)
  for line in lines:
    console.print(line, markup=False)
  rows = console.file.getvalue().splitlines()
  return '\n'.join(row.rstrip() for row in rows if row.strip())


def layer_table(
  layers: Mapping[str, Mapping[str, Any]], total: float, confidence: Mapping[str, str]
) -> Table:
  """Returns the table with a row for each layer.

  Args:
    layers: `kind`, `macs`, `params`, `weights`, `activations` and `cost` of each, by
      path.
    total: the network's cost, of which shares are shown.
    confidence: text for each layer path; empty for no such column.
  """
  table = Table(box=box.SIMPLE_HEAD)
  table.add_column('layer', overflow='fold')
  table.add_column('operator', no_wrap=True)
  for name in ('MACs', 'parameters'):
    table.add_column(name, justify='right', no_wrap=True)
  for name in ('weights', 'activations'):
    table.add_column(name, no_wrap=True)
  if confidence:
    table.add_column('policy', justify='right', no_wrap=True)
  table.add_column('bits', justify='right', no_wrap=True)
  table.add_column('cost share', justify='right', no_wrap=True)
  total = max(total, np.finfo(float).tiny)
  for path, layer in layers.items():
    row = [
      path or '.',
      layer['kind'],
      f'{layer["macs"]:,}',
      f'{layer["params"]:,}',
      layer['weights'],
      layer['activations'],
      *([confidence[path]] if confidence else []),
      ' × '.join(f'{counted_bits(layer[operand]):g}' for operand in OPERANDS),
      f'{layer["cost"] / total:.1%}',
    ]
    table.add_row(*map(Text, row))
  return table


def architecture_table(
  architecture: Mapping[str, int], policy: Mapping[str, Mapping[str, float]]
) -> Table:
  """Returns the table with a row for each decision on the architecture.

  Args:
    architecture: the sizes, by decision.
    policy: the probability of each option, by decision; of others than these too.
  """
  table = Table(box=box.SIMPLE_HEAD)
  table.add_column('architecture', overflow='fold')
  table.add_column('size', justify='right')
  table.add_column('policy', justify='right')
  for name, size in architecture.items():
    probability = policy.get(name, {}).get(str(size))
    confidence = 'fixed' if probability is None else f'{probability:.2f}'
    table.add_row(Text(name), str(size), confidence)
  return table


def print_result(result: Mapping[str, Any], workdir: str) -> None:
  """Prints what a run found, from its result alone."""
  print(to_text(*result_parts(result, workdir)))


def result_parts(
  result: Mapping[str, Any], workdir: str
) -> tuple[list[Table], list[str]]:
  """Returns the tables of a result and the lines below them.

  The tables are of its layers, and of its architecture if that is searched.
  """
  layers = {
    path: {**result['layers'][path], **formats}
    for path, formats in result['formats'].items()
  }
  tables = [layer_table(layers, result['cost'], _confidence(result))]
  if result['architecture']:
    tables.append(architecture_table(result['architecture'], result['policy']))
  lines = [
    *summary_lines(result),
    *_post_training_lines(result),
    *filter(None, [quality_budget.words(result), sensitivities.words(result)]),
    *_emulation_lines(result),
    f'Files: {workdir}',
  ]
  return tables, lines


def front_parts(
  results: Mapping[str, Mapping[str, Any]],
) -> tuple[list[Table], list[str]]:
  """Returns the table of the results of a front, and the lines below it.

  Args:
    results: what `search_result.json` holds, by target.
  """
  found = {name: quality.from_evaluation(r['eval']) for name, r in results.items()}
  some = next(iter(results.values()))
  costs = [value for r in results.values() for value in (r['cost'], r['target'])]
  unit = units.choose(costs, some['cost_unit'])
  table = Table(box=box.SIMPLE_HEAD)
  table.add_column('target')
  titles = f'target ({unit.name})', f'cost ({unit.name})'
  for title in (*titles, next(iter(found.values())).name, 'loss'):
    table.add_column(title, justify='right')
  for name, result in results.items():
    sizes = (f'{unit.scale(result[key]):.6g}' for key in ('target', 'cost'))
    table.add_row(Text(name), *sizes, str(found[name]), f'{result["eval"]["loss"]:.4f}')
  return [table], [uniform_line(some['uniform_costs'], unit)]


def print_points(
  points: Sequence[Mapping[str, Any]], failed: Sequence[str], folder: str
) -> None:
  """Prints the points of a sweep, cheapest first, and the runs that failed."""
  table = Table(box=box.SIMPLE_HEAD)
  for name in ('formats', 'target', 'width'):
    table.add_column(name)
  unit = None
  if points:
    costs = [point['cost'] for point in points]
    unit = units.choose(costs, points[0]['cost_unit'])
  key = quality.find_name(points[0]) if points else 'quality'
  name = quality.to_words(key)
  cost_title = f'cost ({unit.name})' if unit else 'cost'
  for title in (cost_title, quality.to_title(name), 'Pareto front'):
    table.add_column(title, justify='right')
  for point in points:
    row = [
      point['kind'],
      point['target'],
      f'{point["width"]:g}',
      f'{unit.scale(point["cost"]):.6g}',
      quality.to_text(name, point[key]),
      'yes' if point['on_front'] else '',
    ]
    table.add_row(*map(Text, row))
  console = make_console()
  console.print(table)
  for name in failed:
    console.print(f'Failed: {name}', markup=False)
  console.print(f'Files: {folder}', markup=False)


def print_speed(speed: Mapping[str, Any], folder: str) -> None:
  """Prints the times of an exported network beside those of uniform models."""
  table = Table(box=box.SIMPLE_HEAD)
  for name in ('model', 'export'):
    table.add_column(name)
  for name in ('batch', 'ms', 'of float32'):
    table.add_column(name, justify='right')
  table.add_column('layers multiply')
  for row in speed['rows']:
    cells = [
      row['model'],
      row['target'],
      str(row['batch_size']),
      f'{row["ms"]:.4g}',
      f'{row["of_float32"]:.2f}',
      exports.arithmetic_text(row),
    ]
    table.add_row(*map(Text, cells))
  lines = [
    f'Medians of {speed["repeats"]} calls on {speed["device"]}',
    f'Files: {folder}',
  ]
  print(to_text([table], lines))


def summary_lines(result: Mapping[str, Any]) -> list[str]:
  """Returns the lines on cost and quality below the table."""
  cost, target, evaluation = result['cost'], result['target'], result['eval']
  unit = units.choose([cost, target or 0], result['cost_unit'])
  lines = [f'Cost: {unit.text(cost)} ({result["cost_model"]})']
  if target is not None:
    lines[0] += f', {cost / target:.4f} of the target {unit.scale(target):.6g}'
  for cap in result.get('caps', ()):  # which results of earlier versions lack
    cap_unit = units.choose([cap['cost'], cap['limit']], cap['cost_unit'])
    lines.append(
      f'Cap: {cap_unit.text(cap["cost"])} ({cap["cost_model"]}), '
      f'{cap["cost"] / cap["limit"]:.4f} of the cap {cap_unit.scale(cap["limit"]):.6g}'
    )
  if result['uniform_costs']:
    lines.append(uniform_line(result['uniform_costs'], unit))
  values = {k: v for k, v in evaluation.items() if k not in ('loss', 'num_examples')}
  kind = ''
  if result['policy']:
    kind = 'Post-training ' if 'post_training' in result else 'One-shot '
  judged = quality.find_name(evaluation)  # by it an accuracy is known as a fraction
  shown = ', '.join(
    f'accuracy: {value:.2%}'
    if name == judged == 'accuracy'
    else f'{quality.to_words(name)}: {value:.6g}'
    for name, value in values.items()
  )
  shown = (kind + shown)[:1].upper() + (kind + shown)[1:]
  lines.append(
    f'{shown} of {evaluation["num_examples"]} examples (loss {evaluation["loss"]:.4f})'
  )
  return lines


def uniform_line(costs: Mapping[str, float], unit: units.Unit) -> str:
  """Returns the line on costs of uniform models, by format."""
  uniform = ', '.join(f'{name} {unit.scale(c):.6g}' for name, c in costs.items())
  return f'Uniform models: {uniform} {unit.name}'


def _post_training_lines(result):
  """Returns lines on the network before a search without training, and on its loss."""
  if 'post_training' not in result:
    return []
  found = result['post_training']
  before = quality.from_evaluation(found['unquantized_eval'])
  return [
    f'Unquantized: {before.name} {before}',
    f'Quality on {found["examples"]} examples of training: '
    f'{found["unquantized"]:.4g} unquantized, {found["measured"]:.4g} measured, '
    f'{found["predicted"]:.4g} predicted as a sum over layers',
  ]


def _emulation_lines(result):
  """Returns a warning for each pair of formats that the named device only emulates."""
  device = result['config']['search'].get('device')
  pairs = devices.emulated_pairs(device, result['formats']) if device else {}
  return [f'Warning: {line}' for line in pairs.values()]


def _confidence(result):
  """Returns the policy's probability of each layer's formats, by path.

  Of weights and activations where they are decided separately; empty without a policy.
  """
  if not result['policy']:
    return {}
  texts = {}
  for path, operands in decisions_by_layer(result).items():
    chosen = {  # decision -> format, once where it governs both operands
      decision: result['formats'][path][operand]
      for operand, decision in operands.items()
      if decision is not None
    }
    probabilities = [result['policy'][name][chosen[name]] for name in chosen]
    texts[path] = ' / '.join(f'{p:.2f}' for p in probabilities) or 'pinned'
  return texts
