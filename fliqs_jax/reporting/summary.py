"""A run in few words and numbers, and its cost among those of uniform models."""

from collections.abc import Mapping
import math
from typing import Any

from fliqs_jax.reporting import units
from fliqs_jax.reporting.recorded_run import Run
from fliqs_jax.runs import quality
from fliqs_jax.search.quantities import counted_bits


def number(value: float | None) -> str:
  """Returns a number as a person reads it, at four digits."""
  if value is None:
    return '–'
  if not math.isfinite(value):
    return str(value)
  if isinstance(value, int) or (value == int(value) and abs(value) < 1e15):
    return f'{int(value):,}'
  return f'{value:,.0f}' if abs(value) >= 1e4 else f'{value:.4g}'


def cost_text(cost: float, unit: units.Unit) -> str:
  """Returns a cost, given in the cost model's unit, as a person reads it."""
  return f'{number(unit.scale(cost))} {unit.name}'


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
  elif quality.lower_is_better(run.quality.name):
    reached = f'{run.quality} {run.quality.name} on {examples}'
  cost = cost_text(result['cost'], run.unit)
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
    f'{text}. The uniform {nearest} model, at {cost_text(other["cost"], run.unit)}, '
    f'gets {uniform[nearest].quality}: '
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
  name = quality.find_name(last)
  if name:
    words = quality.to_words(name)
    text += f', {quality.to_text(words, last[name])} training {words}'
  if run.kind == 'searched' and 'cost_ratio' in last:
    text += f', sampled costs {last["cost_ratio"]:.3f} of the target'
  return text + '.'


def circumstances(run: Run) -> str:
  """Returns when a run was trained, how long and on what; empty where nobody knows."""
  if not run.sessions:
    return ''
  first, last = run.sessions[0], run.sessions[-1]
  seconds = sum(session.seconds for session in run.sessions)
  devices = dict.fromkeys(
    f'{session.num_devices} {session.device} device{"s" * (session.num_devices > 1)}'
    for session in run.sessions
  )
  text = f'{_date(first.date)}, {_duration(seconds)} on {" and ".join(devices)}'
  if len(run.sessions) > 1:
    text += f', in {len(run.sessions)} sessions, the last of {_date(last.date)}'
  return text + f'; {run.config["num_steps"]:,} steps, seed {run.config["seed"]}.'


def _date(date):
  """2026-11-27T04:22:05Z as 2026-11-27 04:22 UTC."""
  return f'{date[:10]} {date[11:16]} UTC'


def _duration(seconds):
  minutes, rest = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  if hours:
    return f'{hours} h {minutes} min'
  return f'{minutes} min {rest} s' if minutes else f'{rest} s'


def tiles(run: Run) -> list[tuple[str, str, str]]:
  """Returns the numbers at the top: what, how much, and a remark."""
  result = run.result
  if not result:
    done = run.history[-1]['step'] if run.history else 0
    return [('Steps', f'{done:,}', f'of {run.config["num_steps"]:,}')]
  reached, remark = run.quality, f'{result["eval"]["num_examples"]:,} examples'
  if reached.error is not None:
    remark = f'± {100 * reached.error:.2f} points, the standard error of {remark}'
  elif quality.lower_is_better(reached.name):
    remark = f'lower is better, {remark}'
  name = reached.name
  if run.kind == 'searched':
    kind = 'Post-training' if 'post_training' in result else 'One-shot'
    name = f'{kind} {reached.name}'
  cost = number(run.unit.scale(result['cost']))
  found = [
    (name[0].upper() + name[1:], str(reached), remark),
    ('Cost', cost, f'{run.unit.name} ({result["cost_model"]})'),
  ]
  target = result.get('target')
  if target:
    ratio = result['cost'] / target
    remark = f'of {cost_text(target, run.unit)}'
    found.append(('Share of the target', f'{ratio:.1%}', remark))
  sizes = [
    (counted_bits(result['formats'][path]['weights']), layer['params'])
    for path, layer in result.get('layers', {}).items()
  ]
  params = sum(count for _, count in sizes)
  if params:
    mean = sum(bits * count for bits, count in sizes) / params
    size = mean * params / 8
    size = cost_text(size, units.choose([size], 'bytes'))
    remark = f'{size}, {mean / 32:.1%} of float32 and '
    found.append(
      ('Bits of a weight', f'{mean:.2f}', f'{remark}{mean / 16:.1%} of bf16')
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
      'note': run.quality.named,
      'found': True,
    }
  ]
  unknown = {}  # cost -> names
  for name, cost in result['uniform_costs'].items():
    if name not in uniform:
      unknown.setdefault(cost, []).append(name)
  for name, other in uniform.items():
    if other != run:
      note = other.quality.named
      rows.append(_model(f'uniform {name}', other.result['cost'], note))
  for cost, names in unknown.items():
    label = f'uniform {", ".join(names[:2])}' + (', …' if names[2:] else '')
    rows.append(_model(label, cost, 'not trained'))
  return sorted(rows, key=lambda row: (row['cost'], row['found']))


def _model(label, cost, note):
  return {'label': label, 'cost': cost, 'note': note, 'found': False}
