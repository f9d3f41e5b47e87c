"""Figures of a network's formats and costs: of the whole model, and layer by layer."""

from collections.abc import Mapping, Sequence
import math
from typing import Any

from matplotlib import ticker
from matplotlib.figure import Figure
import numpy as np

from fliqs_jax.reporting import units
from fliqs_jax.reporting.figure_style import (
  PALETTE,
  POINTS,
  SMALL,
  WIDE,
  add_legend,
  family,
  new_figure,
  shorten_all,
  styled,
)
from fliqs_jax.search.quantities import counted_bits


@styled
def cost_scale(
  models: Sequence[Mapping[str, Any]], target: float, unit: str, width: float = WIDE
) -> Figure:
  """Draws costs as bars, beside the target.

  Args:
    models: `label`, `cost`, `note` (shown at the right) and `found` (bool) of each.
    target: in the same unit as the costs; NaN for none.
    unit: of the costs; a multiple of it is drawn.
    width: in inches.
  """
  figure = new_figure(width, 0.75 + 0.34 * len(models))
  axes = figure.subplots()
  shown = units.choose([*(model['cost'] for model in models), target], unit)
  costs, target = [shown.scale(model['cost']) for model in models], shown.scale(target)
  places = np.arange(len(models))[::-1]
  for place, model, cost in zip(places, models, costs):
    colour = PALETTE['accent' if model['found'] else 'axis']
    axes.barh(place, cost, height=0.62, color=colour)
  if math.isfinite(target):
    axes.axvline(target, color=PALETTE['ink'], linewidth=1.2, linestyle=(0, (4, 3)))
    axes.set_title('the dashed line is the target', color=PALETTE['muted'], fontsize=8)
  labels = shorten_all([model['label'] for model in models], 22)
  axes.set_yticks(places, labels)
  axes.grid(axis='y', visible=False)
  axes.set_xlim(0, max(*costs, np.nan_to_num(target)) * 1.04)
  axes.xaxis.set_major_locator(ticker.MaxNLocator(6 if width > 6 else 3))
  axes.xaxis.set_major_formatter('{x:g}')
  axes.set_xlabel(f'cost ({shown.name})')
  # In a column of their own, where the target's line does not cross them.
  notes = axes.secondary_yaxis('right')
  notes.set_yticks(places, [model['note'] for model in models])
  notes.spines['right'].set_visible(False)
  for side in (axes, notes):
    side.tick_params(axis='y', length=0, labelcolor=PALETTE['ink'])
    for label, model in zip(side.get_yticklabels(), models):
      label.set_fontweight('bold' if model['found'] else 'normal')
  return figure


@styled
def layer_formats(layers: Sequence[Mapping[str, Any]], width: float = WIDE) -> Figure:
  """Draws the formats of all layers in network order, bits as height.

  Args:
    layers: `path`, `weights` and `activations` (format names), and `share` of the cost
      (None where it is not known) of each.
    width: in inches.
  """
  split = any(layer['weights'] != layer['activations'] for layer in layers)
  names = [layer[operand] for layer in layers for operand in ('weights', 'activations')]
  most_bits = max(map(counted_bits, names))
  largest = max((layer['share'] or 0 for layer in layers), default=0)
  figure, rows = _layer_rows(layers, width, height=1.25)
  for axes, row in rows:
    for place, layer in enumerate(row):
      if largest and layer['share'] is not None:
        axes.bar(
          place, layer['share'] / largest * most_bits, 0.94, color=PALETTE['share']
        )
      bars = ['weights', 'activations'] if split else ['weights']
      for bar, operand in enumerate(bars):
        offset = 0.36 * (bar - 0.5) if split else 0
        _format_bar(axes, place + offset, 0.32 if split else 0.56, layer[operand], row)
    axes.set_ylim(0, most_bits * 1.28)
    axes.set_yticks([bits for bits in (2, 4, 8, 16) if bits <= most_bits])
    axes.set_ylabel('bits')
    if largest:
      right = axes.secondary_yaxis(
        'right',
        functions=(
          lambda bits: bits * largest / most_bits,
          lambda share: share * most_bits / largest,
        ),
      )
      right.yaxis.set_major_formatter(ticker.PercentFormatter(1, decimals=0))
      right.yaxis.set_major_locator(ticker.MaxNLocator(3))
      right.set_ylabel('share of cost')
  extra = [('share', 'share of the cost (right)')] if largest else []
  add_legend(figure, sorted(map(family, set(names))), extra)
  return figure


def _format_bar(axes, place, width, name, row):
  bits = counted_bits(name)
  axes.bar(place, bits, width, color=PALETTE[family(name)])
  crowded = width < 0.5 or len(row) > 24
  axes.annotate(
    name,
    (place, bits),
    (0, 2),
    textcoords='offset points',
    ha='center',
    va='bottom',
    fontsize=SMALL - crowded,
    rotation=90 if crowded else 0,
  )


@styled
def layer_costs(
  layers: Sequence[Mapping[str, Any]], reference: str, unit: str, width: float = WIDE
) -> Figure:
  """Draws the cost of each layer before, in a uniform model, and after.

  Args:
    layers: `path`, `weights` (format name), `cost` and `reference_cost` of each.
    reference: what to call the uniform model.
    unit: of the costs; a multiple of it is drawn.
    width: in inches.
  """
  largest = max(max(layer['cost'], layer['reference_cost']) for layer in layers)
  shown = units.choose([largest], unit)
  figure, rows = _layer_rows(layers, width, height=1.1)
  for axes, row in rows:
    places = np.arange(len(row))
    axes.bar(
      places - 0.2,
      [shown.scale(layer['reference_cost']) for layer in row],
      0.36,
      color=PALETTE['axis'],
    )
    for place, layer in enumerate(row):
      colour = PALETTE[family(layer['weights'])]
      axes.bar(place + 0.2, shown.scale(layer['cost']), 0.36, color=colour)
    axes.set_ylim(0, (shown.scale(largest) or 1) * 1.05)
    axes.yaxis.set_major_locator(ticker.MaxNLocator(4))
    axes.yaxis.set_major_formatter('{x:g}')
    axes.set_ylabel(shown.name)
  families = sorted({family(layer['weights']) for layer in layers})
  add_legend(figure, families, [('axis', f'before: {reference}')], found='found: ')
  return figure


def _layer_rows(layers, width, height):
  """Returns a figure and its rows, `(axes, layers)`, each with room for its names."""
  slot = 0.24  # inches, for the name of a format
  num_rows = math.ceil(len(layers) * slot / (width - 1))
  per_row = math.ceil(len(layers) / num_rows)
  longest = 28 if width > 6 else 20
  names = shorten_all([layer['path'] for layer in layers], longest)
  name_height = max(map(len, names)) * 0.6 * SMALL / POINTS
  figure = new_figure(width, 0.4 + num_rows * (height + name_height + 0.25))
  figure.get_layout_engine().set(h_pad=0.09)  # between names and the row below them
  grid = figure.subplots(num_rows, squeeze=False)[:, 0]
  rows = []
  for index, axes in enumerate(grid):
    part = slice(index * per_row, (index + 1) * per_row)
    axes.set_xlim(-0.6, per_row - 0.4)
    axes.set_xticks(range(len(names[part])), names[part], rotation=90, fontsize=SMALL)
    axes.tick_params(axis='x', length=0)
    axes.grid(axis='x', visible=False)
    rows.append((axes, layers[part]))
  return figure, rows
