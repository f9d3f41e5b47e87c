"""The figure of runs by cost and quality, with their Pareto front."""

from collections.abc import Mapping, Sequence
import itertools
import textwrap
from typing import Any

from etils import epath
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox

from fliqs_jax.reporting import units
from fliqs_jax.reporting.figure_style import (
  LINES,
  PALETTE,
  SMALL,
  WIDE,
  new_figure,
  shorten,
  shorten_all,
  styled,
)
from fliqs_jax.reporting.rendering import to_png
from fliqs_jax.runs import quality as quality_lib

SWEEP_FILE = 'pareto.png'

_MARKERS = {'searched': 'o', 'uniform': 's', 'fixed': 'D'}  # by kind of a point
_LABELS = {'searched': 'target', 'uniform': 'uniform'}  # of a sweep's points
_MARKER_RADIUS = 5  # points
_LOG_SPAN = 4  # largest cost over smallest, from which on their axis is logarithmic

# Where a label may be, in points from its marker, and how it is aligned there; the
# nearest places first.
_PLACES = (
  ((0, 6), ('center', 'bottom')),
  ((0, -6), ('center', 'top')),
  ((5, 5), ('left', 'bottom')),
  ((-5, -5), ('right', 'top')),
  ((5, -5), ('left', 'top')),
  ((-5, 5), ('right', 'bottom')),
  ((7, 0), ('left', 'center')),
  ((-7, 0), ('right', 'center')),
  ((0, 17), ('center', 'bottom')),
  ((0, -17), ('center', 'top')),
  ((0, 28), ('center', 'bottom')),
  ((0, -28), ('center', 'top')),
)


def write_sweep(folder: epath.Path, points: Sequence[Mapping[str, Any]]) -> None:
  """Draws the points of a sweep into its folder.

  Args:
    folder: of the sweep.
    points: as in `pareto.json`.
  """
  key = quality_lib.find_name(points[0])
  drawn = [
    {
      **point,
      # A search at the cost of a uniform model has another name than that model.
      'label': f'{_LABELS[point["kind"]]} {point["target"]}',
      'group': f'width {point["width"]:g}',
      'quality': point[key],
      'error': point['standard_error'],
    }
    for point in points
  ]
  unit, name = points[0]['cost_unit'], quality_lib.to_words(key)
  figure = pareto(drawn, unit, name, _title(points))
  temporary = folder / f'.{SWEEP_FILE}'
  temporary.write_bytes(to_png(figure))
  temporary.replace(folder / SWEEP_FILE)


def _title(points):
  first = points[0]
  steps, seed = f'{first["steps"]:,} steps', f'seed {first["seed"]}'
  return f'{first["model"]} on {first["dataset"]}, {steps}, {seed}'


@styled
def pareto(
  points: Sequence[Mapping[str, Any]],
  unit: str,
  quality: str,
  title: str = '',
  width: float = WIDE,
) -> Figure:
  """Draws quality against cost, and the Pareto front.

  A label that would cover another one is left out.

  Args:
    points: `kind` (searched, uniform or fixed), `label`, `group` (whose points have one
      colour), `cost`, `quality`, `error` (its standard error, None where it is unknown)
      and `on_front` of each.
    unit: of the costs; a multiple of it is drawn.
    quality: what to call it; an `accuracy` is a fraction.
    title: what the points have in common.
    width: in inches.
  """
  wide = width > 6
  figure = new_figure(width, 4.8 if wide else 3.6)
  axes = figure.subplots()
  shown = units.choose([point['cost'] for point in points], unit)
  points = [{**point, 'cost': shown.scale(point['cost'])} for point in points]
  _draw(axes, points, _colours(points))
  costs, scale = [point['cost'] for point in points], ''
  if 0 < min(costs) * _LOG_SPAN <= max(costs):
    axes.set_xscale('log')
    scale = ', logarithmic'
    # A narrow figure has room for three ticks a decade over little more than one.
    dense = wide or max(costs) < 30 * min(costs)
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if dense else (1,)))
    axes.xaxis.set_major_formatter('{x:g}')
    axes.xaxis.set_minor_locator(ticker.NullLocator())
  else:
    axes.xaxis.set_major_locator(ticker.MaxNLocator(7 if wide else 3))
  if quality == 'accuracy':
    axes.yaxis.set_major_formatter(ticker.PercentFormatter(1))
  axes.margins(0.08 if wide else 0.16, 0.2)
  axes.set_xlabel(f'cost ({shown.name}{scale})')
  axes.set_title(textwrap.fill(title, 110 if wide else 44))
  known = any(point['error'] is not None for point in points)
  axes.set_ylabel(quality_lib.to_title(quality) + ' ± standard error' * known)
  _legend(figure, points)
  _label(axes, points, 24 if wide else 12)
  return figure


def _colours(points):
  """Returns the colour of each group; of a group alone, that of what was found."""
  groups = list(dict.fromkeys(point['group'] for point in points))
  names = itertools.cycle(LINES) if groups[1:] else ['accent']
  return {group: PALETTE[name] for group, name in zip(groups, names)}


def _draw(axes, points, colours):
  front = sorted((p['cost'], p['quality']) for p in points if p['on_front'])
  # A step, since a cost between two points buys the cheaper one.
  axes.plot(*zip(*front), color=PALETTE['muted'], linewidth=1, drawstyle='steps-post')
  for point in points:
    colour, searched = colours[point['group']], point['kind'] == 'searched'
    if point['error'] is not None:
      at = point['cost'], point['quality'], point['error']
      axes.errorbar(*at, fmt='none', ecolor=colour, elinewidth=0.8, alpha=0.6)
    axes.scatter(
      point['cost'],
      point['quality'],
      36,
      marker=_MARKERS[point['kind']],
      edgecolors=colour,
      facecolors=colour if searched else PALETTE['surface'],
      zorder=3 + searched,  # on top, where points meet
    )


def _legend(figure, points):
  kinds = {point['kind'] for point in points}
  handles = [Line2D([], [], color=PALETTE['muted'], label='Pareto front')]
  handles += [
    Line2D(
      [],
      [],
      linestyle='',
      marker=marker,
      color=PALETTE['muted'],
      label=kind,
      markerfacecolor=PALETTE['muted' if kind == 'searched' else 'surface'],
    )
    for kind, marker in _MARKERS.items()
    if kind in kinds
  ]
  colours = _colours(points)
  if len(colours) > 1:
    handles += [
      Line2D([], [], linestyle='', marker='o', color=colour, label=shorten(group, 24))
      for group, colour in colours.items()
    ]
  columns = 6 if figure.get_figwidth() > 6 else 2
  figure.legend(handles=handles, loc='outside upper left', ncols=columns)


def _label(axes: Axes, points: Sequence[Mapping[str, Any]], length: int) -> None:
  """Writes labels where they cover neither another one nor, if possible, a marker."""
  figure = axes.figure
  figure.draw_without_rendering()  # places are known from here on
  radius = _MARKER_RADIUS * figure.dpi / 72
  ends = [
    axes.transData.transform(
      [(p['cost'], p['quality'] + sign * (p['error'] or 0)) for p in points]
    )
    for sign in (-1, 1)
  ]  # of error bars, which labels stand beside as they do beside markers
  markers = [Bbox([low - radius, high + radius]) for low, high in zip(*ends)]
  colours, taken = _colours(points), []
  texts = shorten_all([point['label'] for point in points], length)
  for point, text in zip(points, texts):
    label = axes.annotate(
      text,
      (point['cost'], point['quality']),
      textcoords='offset points',
      xytext=(0, 0),
      fontsize=SMALL,
      color=colours[point['group']],
      in_layout=False,  # the axes stay where they are
    )
    boxes = [_put(label, place) for place in _PLACES]
    crowded = [
      (box.count_overlaps(taken) + _sticks_out(box, axes), box.count_overlaps(markers))
      for box in boxes
    ]
    best = min(crowded)
    if best[0]:
      label.remove()
    else:
      taken.append(_put(label, _PLACES[crowded.index(best)]))


def _put(label: Annotation, place: tuple) -> Bbox:
  """Moves a label and returns the box that it then covers, in pixels."""
  label.xyann, (horizontal, vertical) = place
  label.set(horizontalalignment=horizontal, verticalalignment=vertical)
  return label.get_window_extent()


def _sticks_out(box, axes):
  """Returns True for a label that is cut off, or reaches the legend or the ticks."""
  beside = box.x0 < 0 or box.x1 > axes.figure.bbox.x1
  return beside or box.y0 < axes.bbox.y0 or box.y1 > axes.bbox.y1
