"""The words and tables of a report, from runs; its figures come from `figures`."""

from collections.abc import Mapping, Sequence
import math
import shlex
from typing import Any

from fliqs_jax.reporting import quality
from fliqs_jax.reporting import figures as report_figures
from fliqs_jax.numerics import formats as formats_lib
from fliqs_jax.reporting.finished_runs import Run

# Scalars of a history that a report draws: title, how a number reads, reference line.
_PANELS = {
  'loss': ('Training loss', '{:.3g}', None),
  'accuracy': ('Training accuracy', '{:.1%}', None),
  'quality': ('Training quality', '{:.4g}', None),
  'reward': ('Reward', '{:.3f}', None),
  'cost_ratio': ('Cost ÷ target', '{:.3f}', 1.0),
  'entropy': ('Entropy (nats)', '{:.3g}', None),
  'learning_rate': ('Learning rate', '{:.2g}', None),
}


def number(value: float | None) -> str:
  """Returns a number as a person reads it, at four digits."""
  if value is None:
    return '–'
  if not math.isfinite(value):
    return str(value)
  if isinstance(value, int) or (value == int(value) and abs(value) < 1e15):
    return f'{int(value):,}'
  return f'{value:,.0f}' if abs(value) >= 1e4 else f'{value:.4g}'


def headline(run: Run, uniform: Mapping[str, Run]) -> str:
  """Returns what a run found, in a sentence or two.

  Args:
    run: the run.
    uniform: runs of uniform models of the same network, by format.
  """
  result = run.result
  if not result:
    return _unfinished(run)
  examples = f'{result["eval"]["num_examples"]:,} examples'
  reached = f'a {run.quality.name} of {run.quality} on {examples}'
  if run.quality.name == 'accuracy':
    reached = f'{run.quality} of {examples} right'
  cost = f'{number(result["cost"])} {result["cost_unit"]}'
  if run.kind != 'searched':
    name = run.uniform_format
    what = f'The uniform {name} model' if name else 'The model with these fixed formats'
    return f'{what} gets {reached}, at a cost of {cost}.'
  text = f'The formats found get {reached}, at a cost of {cost}'
  if result.get('target'):
    text += f', {result["cost"] / result["target"]:.1%} of the target'
  nearest = _nearest_uniform(result, uniform)
  if nearest is None:
    return f'{text}. No uniform model was trained beside it.'
  other = uniform[nearest].result
  return (
    f'{text}. The uniform {nearest} model, at {number(other["cost"])} '
    f'{other["cost_unit"]}, gets {uniform[nearest].quality}: '
    f'{run.quality.against(uniform[nearest].quality)}.'
  )


def _nearest_uniform(result, uniform):
  aim = result.get('target') or result['cost']
  return min(
    uniform, key=lambda name: abs(uniform[name].result['cost'] - aim), default=None
  )


def _unfinished(run):
  if not run.history:
    return 'This run has not finished, and has written no line of its history yet.'
  last = run.history[-1]
  text = f'This run has not finished: step {last["step"]:,} of '
  text += f'{run.config["num_steps"]:,}'
  name = quality.logged(last)
  if name:
    text += f', {quality.text(name, last[name])} training {name}'
  if run.kind == 'searched' and 'cost_ratio' in last:
    text += f', sampled costs {last["cost_ratio"]:.3f} of the target'
  return text + '.'


def tiles(run: Run) -> list[tuple[str, str, str]]:
  """Returns the figures at the top: what, how much, and a remark."""
  result = run.result
  if not result:
    done = run.history[-1]['step'] if run.history else 0
    return [('Steps', f'{done:,}', f'of {run.config["num_steps"]:,}')]
  reached, remark = run.quality, f'{result["eval"]["num_examples"]:,} examples'
  if reached.error is not None:
    remark = f'± {100 * reached.error:.2f} points, the standard error of {remark}'
  name = f'One-shot {reached.name}' if run.kind == 'searched' else reached.name
  found = [
    (name[0].upper() + name[1:], str(reached), remark),
    ('Cost', number(result['cost']), f'{result["cost_unit"]} ({result["cost_model"]})'),
  ]
  target = result.get('target')
  if target:
    ratio = result['cost'] / target
    remark = f'{number(target)} {result["cost_unit"]}'
    found.append(('Share of the target', f'{ratio:.1%}', f'of {remark}'))
  bits = [
    report_figures.counted_bits(operands['weights'])
    for operands in result['formats'].values()
  ]
  if bits:
    mean = sum(bits) / len(bits)
    found.append(
      ('Mean bits of a weight format', f'{mean:.2f}', f'over {len(bits)} layers')
    )
  return found


def models(run: Run, uniform: Mapping[str, Run]) -> list[dict[str, Any]]:
  """Returns the found model among uniform ones, by cost: label, cost, note, found.

  Formats that cost the same are one row, unless their accuracies are known.
  """
  result = run.result
  rows = [
    {
      'label': 'found' if run.kind == 'searched' else 'this run',
      'cost': result['cost'],
      'note': str(run.quality),
      'found': True,
    }
  ]
  unknown = {}  # cost -> names
  for name, cost in result['uniform_costs'].items():
    if name not in uniform:
      unknown.setdefault(cost, []).append(name)
  for name, other in uniform.items():
    if other != run:
      note = str(other.quality)
      rows.append(_model(f'uniform {name}', other.result['cost'], note))
  for cost, names in unknown.items():
    label = f'uniform {", ".join(names[:2])}' + (', …' if names[2:] else '')
    rows.append(_model(label, cost, 'not trained'))
  return sorted(rows, key=lambda row: (row['cost'], row['found']))


def _model(label, cost, note):
  return {'label': label, 'cost': cost, 'note': note, 'found': False}


def layers(result: Mapping[str, Any], reference: str | None) -> list[dict[str, Any]]:
  """Returns a row for each layer in network order; what is not known is None."""
  described = result.get('layers', {})
  total = sum(layer['cost'] for layer in described.values())
  adds_up = math.isclose(total, result['cost'], rel_tol=1e-6)  # not so for a peak
  rows = []
  for path, operands in result['formats'].items():
    layer = described.get(path, {})
    cost = layer.get('cost')
    rows.append(
      {
        'path': path,
        **operands,
        'kind': layer.get('kind'),
        'macs': layer.get('macs'),
        'params': layer.get('params'),
        'cost': cost,
        'share': cost / total if cost is not None and total and adds_up else None,
        'reference_cost': layer.get('uniform_costs', {}).get(reference),
      }
    )
  return rows


def architecture(run: Run) -> dict[str, Any]:
  """Returns what was chosen of the network itself, by decision; empty without."""
  return (run.result or {}).get('architecture', {})


def decisions(run: Run) -> list[dict[str, Any]]:
  """Returns `name`, `options`, `probabilities` and `found` of each decision.

  Options from few bits to many, or from small to large. Found is what the result has,
  or the likeliest option where the run is not finished (`final` is False then).
  """
  if not run.history:
    return []
  rows = []
  for name, options in run.history[-1]['policy'].items():
    ordered = sorted(options, key=_option_order)
    last = options[max(options, key=options.get)] if options else None
    likeliest = max(options, key=options.get, default=None)
    chosen = _chosen(run.result, name, ordered) if run.result else None
    if not ordered:
      continue
    rows.append(
      {
        'name': name,
        'options': ordered,
        'probabilities': [
          [row['policy'].get(name, {}).get(option, 0.0) for option in ordered]
          for row in run.history
        ],
        'found': chosen or likeliest,
        'likeliest': likeliest,
        'probability': last,
        'final': chosen is not None,
      }
    )
  return rows


def _option_order(option):
  if option in formats_lib.NAMES:
    return (0, report_figures.counted_bits(option), option)
  try:
    return (1, float(option), option)
  except ValueError:
    return (2, 0, option)


def _chosen(result, name, options):
  """The option that the result has; None where a group's layers are not known by name.

  A decision is called after a layer, or a group of layers, and `:weights` or
  `:activations` where these are decided separately.
  """
  architecture = result.get('architecture', {})
  if str(architecture.get(name)) in options:
    return str(architecture[name])
  path, _, operand = name.partition(':')
  operands = result['formats'].get(path) or next(
    (o for layer, o in result['formats'].items() if layer.startswith(f'{path}/')), {}
  )
  format_name = operands.get(operand or 'weights')
  return format_name if format_name in options else None


def marks(run: Run) -> list[report_figures.Mark]:
  """Returns the steps at which a run changed."""
  search, mode = run.config['search'], run.config['mode']
  found = [('a', search['activation_delay'], 'activations are quantized from here on')]
  if mode == 'search':
    found.append(('p', search['policy_delay'], 'the policy starts to learn'))
    if search['hard_budget']:
      found.append(
        ('c', search['commit_step'], 'the formats are committed within the target')
      )
  return [report_figures.Mark(step, letter, meaning) for letter, step, meaning in found]


def panels(run: Run) -> dict[str, dict[str, Any]]:
  """Returns the scalars that every line of a history has, for `curves`."""
  hidden = {'accuracy', 'quality'} - {quality.logged(row) for row in run.history}
  return {
    title: {
      'values': [row[name] for row in run.history],
      'format': form,
      'reference': reference,
    }
    for name, (title, form, reference) in _PANELS.items()
    if name not in hidden and all(name in row for row in run.history)
  }


def settings(config: Mapping[str, Any], prefix: str = '') -> list[tuple[str, Any]]:
  """Returns the fields of a config, nested ones by dotted names."""
  rows = []
  for name, value in config.items():
    if isinstance(value, dict):
      rows += settings(value, f'{prefix}{name}.')
    else:
      rows.append((prefix + name, value))
  return rows


def command(run: Run) -> str | None:
  """Returns the command that does the run again, from the project's folder.

  None where no command can, since the network and its data are a Python program's.
  """
  if run.made_in_python:
    return None
  config = shlex.quote(f'--config=configs/again.py:{run.workdir.absolute()}')
  workdir = shlex.quote(f'--workdir=runs/{run.label}_again')
  return f'python -m fliqs_jax.main {config} {workdir}'


def scale_alt(models: Sequence[Mapping], target: float | None, unit: str) -> str:
  """Returns the cost bars in words."""
  bars = ', '.join(f'{m["label"]} {number(m["cost"])} ({m["note"]})' for m in models)
  aim = f' The target is {number(target)}.' if target else ''
  return f'Bars of cost in {unit}, with what they reach where known: {bars}.{aim}'


def formats_alt(layers: Sequence[Mapping]) -> str:
  """Returns the figure of formats in words."""
  counts = {}
  for layer in layers:
    counts[layer['weights']] = counts.get(layer['weights'], 0) + 1
  named = ', '.join(
    f'{name} in {count}' for name, count in sorted(counts.items(), key=_by_bits)
  )
  return (
    f'Bars of the bits of {len(layers)} layers in network order. Weights: {named}. '
    'The table of layers has every number.'
  )


def _by_bits(item):
  return _option_order(item[0])


def costs_alt(layers: Sequence[Mapping], reference: str) -> str:
  """Returns the figure of costs in words."""
  largest = max(layers, key=lambda layer: layer['cost'])
  share = '' if largest['share'] is None else f', {largest["share"]:.0%} of the total'
  return (
    f'Bars of the cost of {len(layers)} layers, uniform {reference} beside the formats '
    f'found. The most expensive layer is {largest["path"]}{share}.'
  )


def policy_alt(decisions: Sequence[Mapping], steps: Sequence[int]) -> str:
  """Returns the heat map in words."""
  sure = sum(decision['probability'] > 0.9 for decision in decisions)
  return (
    f'Heat map of the probability of every option of {len(decisions)} decisions over '
    f'{steps[-1]:,} steps. At the end {sure} of them have an option above 90 %.'
  )


def curves_alt(panels: Mapping[str, Mapping], steps: Sequence[int]) -> str:
  """Returns the curves in words."""
  ends = ', '.join(
    f'{title} {panel["format"].format(panel["values"][-1])}'
    for title, panel in panels.items()
  )
  return f'Curves over {steps[-1]:,} steps, which end at: {ends}.'


def pareto_alt(points: Sequence[Mapping], unit: str, name: str) -> str:
  """Returns the picture of several runs in words."""
  named = ', '.join(
    f'{p["label"]} ({number(p["cost"])} {unit}, {quality.text(name, p["quality"])}'
    f'{", on the front" if p["on_front"] else ""})'
    for p in points
  )
  return f'{name.capitalize()} against cost: {named}.'
