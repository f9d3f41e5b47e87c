"""Figures: pure functions from numbers to matplotlib figures, without global state."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, PercentFormatter

_MARKERS = {'searched': ('o', 'tab:blue'), 'uniform': ('s', 'tab:gray')}


def pareto(points: Sequence[Mapping[str, Any]]) -> Figure:
  """Returns accuracy against cost, with the Pareto front as a line.

  Args:
    points: of `sweep`, each with `kind` (`searched` or `uniform`), `target`, `width`,
      `cost`, `cost_unit`, `accuracy` as a fraction, and `on_front`.
  """
  figure = Figure(figsize=(8, 5), dpi=150, layout='constrained')
  axes = figure.add_subplot()
  front = sorted(
    (point['cost'], point['accuracy']) for point in points if point['on_front']
  )
  axes.plot(*zip(*front), color='tab:green', linewidth=1.5, label='Pareto front')
  several_widths = len({point['width'] for point in points}) > 1
  for kind, (marker, color) in _MARKERS.items():
    chosen = [point for point in points if point['kind'] == kind]
    axes.scatter(
      [point['cost'] for point in chosen],
      [point['accuracy'] for point in chosen],
      marker=marker,
      color=color,
      label=f'{kind} formats',
      zorder=3,
    )
    for point in chosen:
      width = f', width {point["width"]:g}' if several_widths else ''
      searched = kind == 'searched'
      axes.annotate(
        f'{point["target"]}{width}',
        (point['cost'], point['accuracy']),
        xytext=(0, 8 if searched else -8),
        textcoords='offset points',
        ha='center',
        va='bottom' if searched else 'top',
        fontsize=8,
        color=color,
      )
  axes.set_xscale('log')
  for formatter in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
    formatter(FuncFormatter(lambda cost, _: f'{cost:.3g}'))
  axes.xaxis.set_minor_formatter(NullFormatter())
  axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=1))
  axes.margins(x=0.1, y=0.15)
  axes.set_xlabel(f'cost ({points[0]["cost_unit"]})')
  axes.set_ylabel('accuracy')
  axes.grid(alpha=0.3)
  axes.legend(loc='lower right')
  return figure
