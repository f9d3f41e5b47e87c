"""Figures of an analysis, in the style of a report's: from data to matplotlib."""

from collections.abc import Mapping, Sequence

from matplotlib import colors, ticker
from matplotlib.figure import Figure
import numpy as np

from fliqs_jax.reporting.figure_style import (
  LINES,
  PALETTE,
  new_figure,
  shorten_all,
  styled,
)
from fliqs_jax.runs import quality


@styled
def switching(names: Sequence[str], errors: np.ndarray) -> Figure:
  """Draws switching errors float[F, F] as a table."""
  size = 1.6 + 0.55 * len(names)
  figure = new_figure(max(size, 4), max(size, 4))
  axes = figure.subplots()
  shades = colors.LinearSegmentedColormap.from_list(
    'errors', [PALETTE['surface'], PALETTE['accent']]
  )
  shown = np.maximum(errors, 1e-6)
  scale = colors.LogNorm(1e-5, 1)
  axes.imshow(shown, cmap=shades, norm=scale)
  for i, row in enumerate(errors):
    for j, error in enumerate(row):
      dark = scale(max(error, 1e-5)) > 0.8  # where white reads better than black
      text = f'{error:.0e}' if 0 < error < 1e-3 else f'{error:.2g}'
      colour = PALETTE['surface' if dark else 'ink']
      axes.text(j, i, text, ha='center', va='center', fontsize=7.5, color=colour)
  axes.set_xticks(range(len(names)), names, rotation=90)
  axes.set_yticks(range(len(names)), names)
  axes.grid(visible=False)
  axes.set_xlabel('switched to')
  axes.set_ylabel('switched from')
  axes.set_title('Switching error, over the weights’ mean square')
  return figure


@styled
def clipping(panels: Mapping[str, Mapping[str, Mapping]]) -> Figure:
  """Draws errors against clipping thresholds, a panel for each kind of data.

  Args:
    panels: by title and format, `thresholds`, `errors` and `best`, the index of the
      smallest error.
  """
  figure = new_figure(5.2 * len(panels), 4)
  grid = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
  for axes, (title, curves) in zip(grid, panels.items()):
    for place, (name, curve) in enumerate(curves.items()):
      colour = PALETTE[LINES[place % len(LINES)]]
      thresholds, errors = curve['thresholds'], curve['errors']
      style = ('-', '--', ':')[place // len(LINES) % 3]
      axes.plot(thresholds, errors, style, color=colour, label=name)
      axes.plot(thresholds[curve['best']], errors[curve['best']], 'o', color=colour)
    axes.set_yscale('log')
    axes.yaxis.set_major_formatter(ticker.StrMethodFormatter('{x:g}'))
    axes.yaxis.set_minor_formatter(ticker.NullFormatter())
    axes.set_xscale('log')
    axes.xaxis.set_major_locator(ticker.FixedLocator([1, 2, 4, 8, 16]))
    axes.xaxis.set_major_formatter(ticker.StrMethodFormatter('{x:g}'))
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())
    axes.set_title(title)
    axes.set_xlabel('clipping threshold (rms); the dot is the best')
  grid[0].set_ylabel('square error, over the mean square')
  figure.legend(*grid[0].get_legend_handles_labels(), loc='outside right upper')
  return figure


@styled
def entropy(rows: Sequence[Mapping]) -> Figure:
  """Draws the entropy over the steps and the quality at the end, by entropy weight.

  Args:
    rows: `weight`, `steps`, `entropy`, what the run is judged by (`accuracy` for
      instance) and its `standard_error`, None where it is unknown, of each run.
  """
  key = quality.find_name(rows[0])
  name = quality.to_words(key)
  figure = new_figure(10.4, 3.8)
  left, right = figure.subplots(1, 2)
  for place, row in enumerate(rows):
    colour = PALETTE[LINES[place % len(LINES)]]
    left.plot(row['steps'], row['entropy'], color=colour, label=f'{row["weight"]:g}')
    right.errorbar(
      place, row[key], row['standard_error'], fmt='o', color=colour, capsize=3
    )
  left.set_xlabel('step')
  left.set_ylabel('entropy of the policy (nats)')
  left.set_title('Convergence, by entropy weight')
  left.legend(title='entropy weight')
  right.set_xticks(range(len(rows)), [f'{row["weight"]:g}' for row in rows])
  right.set_xlabel('entropy weight')
  right.set_ylabel(f'one-shot {quality.to_title(name)}')
  title = name.capitalize()
  if key == 'accuracy':
    title += ', with its standard error over examples'
    right.yaxis.set_major_formatter(ticker.PercentFormatter(1, decimals=1))
  right.set_title(title)
  right.margins(0.15, 0.2)
  return figure


@styled
def formats_by_depth(rows: Sequence[Mapping]) -> Figure:
  """Draws the bits of layers against their depth.

  Args:
    rows: `path`, `kind`, and `bits`, the mean over runs, of each layer in order.
  """
  figure = new_figure(max(5, 1.5 + 0.26 * len(rows)), 4)
  axes = figure.subplots()
  kinds = list(dict.fromkeys(row['kind'] for row in rows))
  for kind, colour, marker in zip(kinds, LINES, 'osD^vX'):
    these = [(i, row['bits']) for i, row in enumerate(rows) if row['kind'] == kind]
    axes.plot(*zip(*these), marker, color=PALETTE[colour], label=kind)
  names = shorten_all([row['path'] for row in rows], 28)
  axes.set_xticks(range(len(rows)), names, rotation=90, fontsize=7.5)
  axes.set_ylabel('bits of the weights, mean over runs')
  axes.set_ylim(0)
  axes.yaxis.set_major_locator(ticker.MaxNLocator(8, integer=True))
  figure.legend(loc='outside upper left', ncols=len(kinds))
  return figure
