"""Figures of a report: pure functions from data to matplotlib figures.

No pyplot and no state outside a call. Every colour is one of `PALETTE` and unlike the
others, so that a page can replace them in an SVG by its own, light or dark. A figure
is `width` inches wide, its type as large in a narrow one as in a wide one.
"""

from collections.abc import Mapping, Sequence
import math
from typing import Any, NamedTuple

import matplotlib
from matplotlib import colors, patches, ticker
from matplotlib.figure import Figure
import numpy as np

from fliqs_jax.numerics import formats as formats_lib
from fliqs_jax.search.cost_models import UNQUANTIZED_BITS

WIDE, NARROW = 11.2, 3.6  # inches, which a page shows as 96 pixels each

PALETTE = {
  'ink': '#0b0b0c',
  'muted': '#52514e',
  'axis': '#b4b3ac',
  'grid': '#e3e2db',
  'share': '#dfdccf',
  'surface': '#fdfdfc',
  'integer': '#2a78d6',
  'float': '#d9622b',
  'unquantized': '#8a8880',
  'architecture': '#1a9b71',
  'accent': '#5b45c9',
}

STYLE = {
  'axes.axisbelow': True,
  'axes.edgecolor': PALETTE['axis'],
  'axes.facecolor': 'none',
  'axes.grid': True,
  'axes.labelcolor': PALETTE['muted'],
  'axes.spines.right': False,
  'axes.spines.top': False,
  'axes.titlecolor': PALETTE['ink'],
  'axes.titlelocation': 'left',
  'axes.titlesize': 9,
  'figure.facecolor': 'none',
  'font.size': 8.5,
  'grid.color': PALETTE['grid'],
  'grid.linewidth': 0.7,
  'legend.frameon': False,
  'legend.labelcolor': PALETTE['muted'],
  'svg.fonttype': 'none',  # text stays text
  'text.color': PALETTE['ink'],
  'text.hinting': 'no_hinting',  # as wide at any resolution as it was laid out
  'text.parse_math': False,  # names may hold a dollar
  'xtick.color': PALETTE['axis'],
  'xtick.labelcolor': PALETTE['muted'],
  'ytick.color': PALETTE['axis'],
  'ytick.labelcolor': PALETTE['muted'],
}

# Lines of a figure, in the order in which they are told apart best.
LINES = ('integer', 'float', 'architecture', 'accent', 'unquantized', 'ink')

SMALL = 7.5  # points
_POINTS = 72  # an inch

_styled = matplotlib.rc_context(STYLE)


class Mark(NamedTuple):
  """A step at which a run changed, drawn as a line."""

  step: int
  letter: str
  meaning: str


def family(name: str) -> str:
  """Returns what an option is, as `PALETTE` colours it."""
  if name in formats_lib.INTEGER_NAMES:
    return 'integer'
  if name in formats_lib.FLOAT_NAMES:
    return 'float'
  return 'unquantized' if name in formats_lib.NAMES else 'architecture'


def counted_bits(name: str) -> int:
  """Returns the bits of a format as costs count them."""
  return min(int(formats_lib.get_format(name).bits), UNQUANTIZED_BITS)


@_styled
def cost_scale(
  models: Sequence[Mapping[str, Any]], target: float, unit: str, width: float = WIDE
) -> Figure:
  """Draws costs as bars, beside the target.

  Args:
    models: `label`, `cost`, `note` (shown behind the bar) and `found` (bool) of each.
    target: in the same unit as the costs; NaN for none.
    unit: of the costs.
    width: in inches.
  """
  figure = _figure(width, 0.75 + 0.34 * len(models))
  axes = figure.subplots()
  largest = max(max(model['cost'] for model in models), np.nan_to_num(target))
  places = np.arange(len(models))[::-1]
  for place, model in zip(places, models):
    colour = PALETTE['accent' if model['found'] else 'axis']
    axes.barh(place, model['cost'], height=0.62, color=colour)
    axes.annotate(
      model['note'], (model['cost'], place), (5, 0), textcoords='offset points',
      va='center', fontweight='bold' if model['found'] else 'normal',
      bbox={'facecolor': PALETTE['surface'], 'edgecolor': 'none', 'pad': 1},
    )  # fmt: skip
  if math.isfinite(target):
    axes.axvline(target, color=PALETTE['ink'], linewidth=1.2, linestyle=(0, (4, 3)))
    axes.set_title('the dashed line is the target', color=PALETTE['muted'], fontsize=8)
  axes.set_yticks(places, [shorten(model['label'], 22) for model in models])
  axes.tick_params(axis='y', length=0, labelcolor=PALETTE['ink'])
  axes.grid(axis='y', visible=False)
  axes.set_xlim(0, largest * (1.25 if width > 6 else 1.9))
  axes.xaxis.set_major_locator(ticker.MaxNLocator(6 if width > 6 else 3))
  axes.xaxis.set_major_formatter('{x:g}')
  axes.set_xlabel(f'cost ({unit})')
  return figure


@_styled
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
  _legend(figure, sorted(map(family, set(names))), extra)
  return figure


def _format_bar(axes, place, width, name, row):
  bits = counted_bits(name)
  axes.bar(place, bits, width, color=PALETTE[family(name)])
  crowded = width < 0.5 or len(row) > 24
  axes.annotate(
    name, (place, bits), (0, 2), textcoords='offset points', ha='center', va='bottom',
    fontsize=SMALL - crowded, rotation=90 if crowded else 0,
  )  # fmt: skip


@_styled
def layer_costs(
  layers: Sequence[Mapping[str, Any]], reference: str, unit: str, width: float = WIDE
) -> Figure:
  """Draws the cost of each layer before, in a uniform model, and after.

  Args:
    layers: `path`, `weights` (format name), `cost` and `reference_cost` of each.
    reference: what to call the uniform model.
    unit: of the costs.
    width: in inches.
  """
  largest = max(max(layer['cost'], layer['reference_cost']) for layer in layers)
  figure, rows = _layer_rows(layers, width, height=1.1)
  for axes, row in rows:
    places = np.arange(len(row))
    axes.bar(
      places - 0.2, [layer['reference_cost'] for layer in row], 0.36,
      color=PALETTE['axis'],
    )  # fmt: skip
    for place, layer in enumerate(row):
      colour = PALETTE[family(layer['weights'])]
      axes.bar(place + 0.2, layer['cost'], 0.36, color=colour)
    axes.set_ylim(0, (largest or 1) * 1.05)
    axes.yaxis.set_major_locator(ticker.MaxNLocator(4))
    axes.yaxis.set_major_formatter('{x:g}')
    axes.set_ylabel(unit)
  families = sorted({family(layer['weights']) for layer in layers})
  _legend(figure, families, [('axis', f'before: {reference}')], found='found: ')
  return figure


@_styled
def policy_heat_map(
  steps: Sequence[int],
  decisions: Sequence[Mapping[str, Any]],
  marks: Sequence[Mark] = (),
  width: float = WIDE,
) -> Figure:
  """Draws the probability of every option of every decision over the steps.

  Args:
    steps: of the T lines of a history.
    decisions: `name`, `options`, `probabilities` `[T][K]` and `found` (an option, or
      None) of each. The options are drawn in their order, the last one on top.
    marks: steps to mark.
    width: in inches.
  """
  image, bands = _heat_image(np.asarray(steps), decisions)
  fewest = min(len(decision['options']) for decision in decisions)
  # Type needs its height: of every option where there is room, else of decisions.
  row = max(min(SMALL + 1, 1500 / len(image)), (SMALL + 1.5) / fewest)
  labelled = row >= SMALL
  half = SMALL / row / 2  # of a name's height, in rows: names stay with their decision
  figure = _figure(width, 0.8 + row * len(image) / _POINTS)
  axes = figure.subplots()
  axes.imshow(
    image, aspect='auto', interpolation='none', extent=(0, steps[-1], len(image), 0)
  )
  axes.set_yticks(
    [top + len(d['options']) / 2 for top, d in zip(bands, decisions)],
    [shorten(d['name'], 34 if width > 6 else 17) for d in decisions],
  )
  axes.tick_params(axis='y', length=0, labelsize=SMALL, labelcolor=PALETTE['ink'])
  axes.spines['left'].set_visible(False)
  axes.grid(visible=False)
  for top, decision in zip(bands, decisions):
    for place, option in enumerate(reversed(decision['options'])):
      middle = top + place + 0.5
      if option == decision['found']:
        axes.plot(
          steps[-1], middle, '<', color=PALETTE['ink'], markersize=min(5, row),
          clip_on=False,
        )  # fmt: skip
      if labelled or option == decision['found']:
        near = np.clip(middle, top + half, top + len(decision['options']) - half)
        axes.annotate(
          shorten(option, 8), (steps[-1], near), (8, 0), fontsize=SMALL - 1,
          textcoords='offset points', va='center', color=PALETTE['muted'],
          annotation_clip=False,
        )  # fmt: skip
  _draw_marks(axes, marks, steps[-1])
  _step_axis(axes, 8 if width > 6 else 4)
  options = {option for decision in decisions for option in decision['options']}
  _legend(figure, sorted(map(family, options)), extra=[])
  return figure


def _heat_image(steps, decisions, columns=400):
  """Returns RGBA [rows, columns], and the top row of each decision."""
  centres = (np.arange(columns) + 0.5) / columns * steps[-1]
  lines = np.minimum(np.searchsorted(steps, centres), len(steps) - 1)
  parts, bands, top = [], [], 0
  for decision in decisions:
    probabilities = np.asarray(decision['probabilities'], float)[lines].T[::-1]
    part = np.empty((*probabilities.shape, 4))
    for row, option in zip(part, reversed(decision['options'])):
      row[:, :3] = colors.to_rgb(PALETTE[family(option)])
    part[:, :, 3] = np.clip(np.nan_to_num(probabilities), 0, 1)
    parts += [part, np.zeros((1, columns, 4))]
    bands.append(top)
    top += len(part) + 1
  return np.concatenate(parts), bands


@_styled
def curves(
  steps: Sequence[int],
  panels: Mapping[str, Mapping[str, Any]],
  marks: Sequence[Mark] = (),
  width: float = WIDE,
) -> Figure:
  """Draws scalars over the steps, a panel for each.

  Args:
    steps: of the T lines of a history.
    panels: by title, `values` `[T]`, `format` (of a number), and `reference`, a value
      to draw a line at, or None.
    marks: steps to mark.
    width: in inches.
  """
  columns = min(3 if width > 6 else 1, len(panels))
  rows = math.ceil(len(panels) / columns)
  figure = _figure(width, 1.9 * rows + 0.1)
  grid = figure.subplots(rows, columns, squeeze=False, sharex=True).flat
  for axes, (title, panel) in zip(grid, panels.items()):
    axes.plot(steps, panel['values'], color=PALETTE['accent'], linewidth=1.6)
    if len(steps) == 1:
      axes.plot(steps, panel['values'], 'o', color=PALETTE['accent'], clip_on=False)
    if panel['reference'] is not None:
      axes.axhline(
        panel['reference'], color=PALETTE['ink'], linewidth=1, linestyle=(0, (4, 3))
      )
    last = panel['format'].format(panel['values'][-1])
    axes.set_title(f'{title}: {last} at step {steps[-1]:,}', pad=SMALL + 6)
    axes.margins(y=0.12)
    axes.set_xlim(0, steps[-1])
    axes.yaxis.set_major_locator(ticker.MaxNLocator(4))
    percent = ticker.PercentFormatter(1)
    axes.yaxis.set_major_formatter(percent if '%' in panel['format'] else '{x:g}')
    _draw_marks(axes, marks, steps[-1])
    _step_axis(axes, 5)
    axes.tick_params(labelbottom=True)
  for axes in list(grid)[len(panels) :]:
    axes.set_visible(False)
  return figure


def shorten(name: str, length: int) -> str:
  """Returns the end of a name, which tells layers apart, without odd characters."""
  odd = '\N{REPLACEMENT CHARACTER}'
  printable = ''.join(c if c.isprintable() else odd for c in name)
  return printable if len(printable) <= length else '…' + printable[1 - length :]


def _figure(width, height):
  return Figure(figsize=(width, height), layout='constrained')


def _layer_rows(layers, width, height):
  """Returns a figure and its rows, `(axes, layers)`, each with room for its names."""
  slot = 0.24  # inches, for the name of a format
  num_rows = math.ceil(len(layers) * slot / (width - 1))
  per_row = math.ceil(len(layers) / num_rows)
  longest = 28 if width > 6 else 20
  names = [shorten(layer['path'], longest) for layer in layers]
  name_height = max(map(len, names)) * 0.6 * SMALL / _POINTS
  figure = _figure(width, 0.4 + num_rows * (height + name_height + 0.25))
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


def _legend(figure, families, extra, found=''):
  names = [(name, found + name) for name in dict.fromkeys(families)] + extra
  handles = [patches.Patch(color=PALETTE[colour], label=text) for colour, text in names]
  figure.legend(
    handles=handles,
    loc='outside upper left',
    ncols=4 if figure.get_figwidth() > 6 else 2,
    handlelength=1,
    fontsize=8,
  )


def _step_axis(axes, num_ticks):
  axes.xaxis.set_major_locator(ticker.MaxNLocator(num_ticks, integer=True))
  axes.xaxis.set_major_formatter('{x:,.0f}')
  axes.set_xlabel('step')


def _draw_marks(axes, marks, last):
  """Draws lines, and above them their letters, those of near steps as one word."""
  shown = sorted(mark for mark in marks if 0 < mark.step <= last)
  words = []  # [first step, letters]
  for mark in shown:
    axes.axvline(mark.step, color=PALETTE['muted'], linewidth=0.8, linestyle=':')
    if words and mark.step - words[-1][0] < 0.04 * last:
      words[-1][1] += mark.letter
    else:
      words.append([mark.step, mark.letter])
  for step, letters in words:
    axes.annotate(
      letters, (step, 1), (0, 2), xycoords=('data', 'axes fraction'),
      textcoords='offset points', ha='center', va='bottom', fontsize=SMALL,
      color=PALETTE['muted'],
    )  # fmt: skip
