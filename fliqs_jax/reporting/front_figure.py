"""Figure of a budget of quality: what the assignments lose that were measured."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import ticker
from matplotlib.figure import Figure

from fliqs_jax.reporting.figure_style import PALETTE, SMALL, WIDE, new_figure, styled

_LOG_SPAN = 4  # largest cost over smallest, from which on their axis is logarithmic
_SHOWN = 4  # times the limit; what loses more is above the figure


@styled
def lost_quality(
  points: Sequence[Mapping[str, Any]],
  limit: float,
  unit: str,
  what: str,
  width: float = WIDE,
) -> Figure:
  """Draws the quality lost against cost, with the limit, and marks what was chosen.

  Args:
    points: `cost`, `lost`, `within` and `chosen` of each, cheapest first.
    limit: the most that may be lost.
    unit: of the costs.
    what: the quality lost, and its unit.
    width: in inches.
  """
  figure = new_figure(width, 3.4)
  axes = figure.subplots()
  axes.axhline(limit, color=PALETTE['ink'], linewidth=1.2, linestyle=(0, (4, 3)))
  axes.plot(
    [p['cost'] for p in points],
    [p['lost'] for p in points],
    color=PALETTE['axis'],
    linewidth=1,
  )
  for point in points:
    colour = PALETTE['accent' if point['within'] else 'axis']
    axes.plot(point['cost'], point['lost'], 'o', color=colour, markersize=5)
    if point['chosen']:
      axes.plot(
        point['cost'],
        point['lost'],
        'o',
        color=PALETTE['ink'],
        markersize=11,
        fillstyle='none',
      )
  if points[-1]['cost'] > _LOG_SPAN * points[0]['cost'] > 0:
    axes.set_xscale('log')
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_minor_locator(ticker.NullLocator())
  axes.xaxis.set_major_formatter('{x:g}')
  axes.margins(y=0.12)
  lost = [point['lost'] for point in points]
  if 0 < _SHOWN * limit < max(lost):
    lowest = min(0, *lost)
    axes.set_ylim(lowest - 0.3 * limit, _SHOWN * limit)
  axes.tick_params(labelsize=SMALL)
  axes.set_xlabel(f'cost ({unit})')
  axes.set_ylabel(what)
  return figure
