"""Figures in words, for those who cannot see them."""

from collections.abc import Mapping, Sequence

from fliqs_jax.reporting import units
from fliqs_jax.reporting.sensitivities import words
from fliqs_jax.reporting.summary import cost_text, number
from fliqs_jax.reporting.tables import option_order
from fliqs_jax.runs import quality


def scale(models: Sequence[Mapping], target: float | None, unit: str) -> str:
  """Returns the cost bars in words."""
  shown = units.choose([*(m['cost'] for m in models), target or 0], unit)
  bars = ', '.join(
    f'{m["label"]} {number(shown.scale(m["cost"]))} ({m["note"]})' for m in models
  )
  aim = f' The target is {number(shown.scale(target))}.' if target else ''
  return f'Bars of cost in {shown.name}, with what they reach where known: {bars}.{aim}'


def formats(layers: Sequence[Mapping]) -> str:
  """Returns the figure of formats in words."""
  counts = {}
  for layer in layers:
    counts[layer['weights']] = counts.get(layer['weights'], 0) + 1
  names = sorted(counts, key=option_order)
  named = ', '.join(f'{name} in {counts[name]}' for name in names)
  return (
    f'Bars of the bits of {len(layers)} layers in network order. Weights: {named}. '
    'The table of layers has every number.'
  )


def costs(layers: Sequence[Mapping], reference: str) -> str:
  """Returns the figure of costs in words."""
  largest = max(layers, key=lambda layer: layer['cost'])
  share = '' if largest['share'] is None else f', {largest["share"]:.0%} of the total'
  return (
    f'Bars of the cost of {len(layers)} layers, uniform {reference} beside the formats '
    f'found. The most expensive layer is {largest["path"]}{share}.'
  )


def sensitivities(result: Mapping) -> str:
  """Returns the map of sensitivities in words."""
  count = len(result['sensitivities'])
  return (
    f'Map of what {count} decisions lose in each format. {words(result)} The table of '
    'sensitivities has every number.'
  )


def front(result: Mapping) -> str:
  """Returns the figure of a budget of quality in words."""
  points = ', '.join(
    f'{point["lost"]:.3g} at {number(point["cost"])}'
    f'{" (chosen)" if point["chosen"] else ""}'
    for point in result['front']
  )
  return f'Quality lost against cost in {result["cost_unit"]}: {points}.'


def policy(decisions: Sequence[Mapping], steps: Sequence[int]) -> str:
  """Returns the heat map in words."""
  sure = sum(decision['probability'] > 0.9 for decision in decisions)
  return (
    f'Heat map of the probability of every option of {len(decisions)} decisions over '
    f'{steps[-1]:,} steps. At the end {sure} of them have an option above 90 %.'
  )


def curves(panels: Mapping[str, Mapping], steps: Sequence[int]) -> str:
  """Returns the curves in words."""

  def named(values):
    shown = (f'{t} {panels[t]["format"].format(value)}' for t, value in values.items())
    return ', '.join(shown)

  ends = named({title: panel['values'][-1] for title, panel in panels.items()})
  evaluated = {t: p['evaluated'][-1][1] for t, p in panels.items() if p['evaluated']}
  dots = f' Dots of evaluations meanwhile end at: {named(evaluated)}.'
  text = f'Curves over {steps[-1]:,} steps, which end at: {ends}.'
  return text + (dots if evaluated else '')


def pareto(points: Sequence[Mapping], unit: str, name: str) -> str:
  """Returns the picture of several runs in words."""
  shown = units.choose([p['cost'] for p in points], unit)
  named = ', '.join(
    f'{p["label"]} ({cost_text(p["cost"], shown)}, '
    f'{quality.to_text(name, p["quality"])}{", on the front" if p["on_front"] else ""})'
    for p in points
  )
  return f'{name.capitalize()} against cost: {named}.'
