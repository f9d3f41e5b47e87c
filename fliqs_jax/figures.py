"""Figures: pure functions from numbers to matplotlib figures, without global state."""

from collections.abc import Mapping, Sequence
import itertools
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, PercentFormatter
from matplotlib.transforms import Bbox

_KINDS = {'searched': 'o', 'uniform': 's'}  # kind of a point -> its marker
_COLORS = ('tab:blue', 'tab:orange', 'tab:purple', 'tab:red', 'tab:brown', 'tab:cyan')

# Where a label may be, in points from its marker, and how it is aligned there; the
# nearest places first.
_PLACES = (
  ((0, 6), ('center', 'bottom')),
  ((0, -6), ('center', 'top')),
  ((7, 0), ('left', 'center')),
  ((-7, 0), ('right', 'center')),
  ((5, 5), ('left', 'bottom')),
  ((-5, -5), ('right', 'top')),
  ((5, -5), ('left', 'top')),
  ((-5, 5), ('right', 'bottom')),
  ((0, 17), ('center', 'bottom')),
  ((0, -17), ('center', 'top')),
  ((0, 28), ('center', 'bottom')),
  ((0, -28), ('center', 'top')),
)
_MARKER_RADIUS = 8  # pixels


def pareto(points: Sequence[Mapping[str, Any]]) -> Figure:
  """Returns accuracy against cost, with the Pareto front as a line.

  Args:
    points: one or more, each with `kind` (`searched` or `uniform`), `target`, `width`,
      `cost`, `cost_unit`, `accuracy` as a fraction, and `on_front`.
  """
  figure = Figure(figsize=(8, 5), dpi=150, layout='constrained')
  axes = figure.add_subplot()
  front = sorted((p['cost'], p['accuracy']) for p in points if p['on_front'])
  # A step, since a cost between two points buys the cheaper one.
  axes.plot(
    *zip(*front), color='tab:green', drawstyle='steps-post', label='Pareto front'
  )
  widths = sorted({point['width'] for point in points})
  colors = dict(zip(widths, itertools.cycle(_COLORS)))
  for (width, color), kind in itertools.product(colors.items(), _KINDS):
    chosen = [p for p in points if (p['width'], p['kind']) == (width, kind)]
    if chosen:
      axes.scatter(
        [point['cost'] for point in chosen],
        [point['accuracy'] for point in chosen],
        marker=_KINDS[kind],
        edgecolors=color,
        facecolors=color if kind == 'searched' else 'white',
        label=f'{kind} formats, width {width:g}',
        zorder=3,
      )
  axes.set_xscale('log')
  axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
  axes.xaxis.set_major_formatter('{x:g}')
  axes.xaxis.set_minor_locator(NullLocator())
  axes.yaxis.set_major_formatter(PercentFormatter(1.0))
  axes.margins(x=0.08, y=0.2)
  axes.set_xlabel(f'cost ({points[0]["cost_unit"]})')
  axes.set_ylabel('accuracy')
  axes.grid(alpha=0.3)
  figure.legend(loc='outside upper center', ncols=3, frameon=False)
  _label(axes, points, colors)
  return figure


def _label(
  axes: Axes, points: Sequence[Mapping[str, Any]], colors: Mapping[float, str]
) -> None:
  """Writes each point's target where it covers neither a marker nor a label."""
  axes.figure.draw_without_rendering()  # places are known from here on
  centers = axes.transData.transform([(p['cost'], p['accuracy']) for p in points])
  radius = _MARKER_RADIUS
  taken = [Bbox([center - radius, center + radius]) for center in centers]
  for point in points:
    label = axes.annotate(
      point['target'],
      (point['cost'], point['accuracy']),
      xytext=(0, 0),
      textcoords='offset points',
      fontsize=8,
      color=colors[point['width']],
      in_layout=False,  # the axes stay where they are
    )
    boxes = [_put(label, place) for place in _PLACES]
    crowded = [box.count_overlaps(taken) for box in boxes]
    chosen = crowded.index(min(crowded))
    taken.append(_put(label, _PLACES[chosen]))


def _put(label, place):
  """Moves a label and returns the box that it then covers, in pixels."""
  label.xyann, (horizontal, vertical) = place
  label.set(horizontalalignment=horizontal, verticalalignment=vertical)
  return label.get_window_extent()
