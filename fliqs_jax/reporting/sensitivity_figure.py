"""Figure of sensitivities: what each format of each layer loses, as a map."""

from collections.abc import Mapping, Sequence
import math
from typing import Any

from matplotlib import colors
from matplotlib.figure import Figure
import numpy as np

from fliqs_jax.reporting.figure_style import (
  PALETTE,
  POINTS,
  SMALL,
  WIDE,
  new_figure,
  shorten,
  styled,
)

DECADES = 3  # from the strongest colour to none


@styled
def sensitivity_map(
  rows: Sequence[Mapping[str, Any]], found: Mapping[str, str], width: float = WIDE
) -> Figure:
  """Draws a map with a column for each decision and a cell for each of its formats.

  Colours are on a logarithmic scale; what loses nothing, or gains, has none.

  Args:
    rows: `name`, `options` and `losses` of each decision, those with few bits first.
    found: the format that was found of each decision, which gets a dot.
    width: in inches.
  """
  options = list(dict.fromkeys(option for row in rows for option in row['options']))
  largest = max((loss for row in rows for loss in row['losses']), default=0)
  slot, cell = 0.24, 0.2  # inches
  num_lines = math.ceil(len(rows) * slot / (width - 1))
  per_line = math.ceil(len(rows) / num_lines)
  longest = 28 if width > 6 else 20
  names = [shorten(row['name'], longest) for row in rows]
  name_height = max(map(len, names)) * 0.6 * SMALL / POINTS
  height = num_lines * (cell * len(options) + name_height + 0.3)
  figure = new_figure(width, 0.2 + height)
  figure.get_layout_engine().set(h_pad=0.09)
  for index, axes in enumerate(figure.subplots(num_lines, squeeze=False)[:, 0]):
    part = slice(index * per_line, (index + 1) * per_line)
    _draw_line(axes, rows[part], names[part], per_line, options, largest, found)
  return figure


def _draw_line(axes, rows, names, per_line, options, largest, found):
  image = np.zeros((len(options), per_line, 4))
  image[:, :, :3] = colors.to_rgb(PALETTE['accent'])
  for place, row in enumerate(rows):
    for option, loss in zip(row['options'], row['losses']):
      image[options.index(option), place, 3] = strength(loss, largest)
    chosen = found.get(row['name'])
    if chosen in options:
      axes.plot(place, options.index(chosen), 'o', color=PALETTE['ink'], markersize=3)
  # Fewest bits on top.
  extent = (-0.5, per_line - 0.5, len(options) - 0.5, -0.5)
  axes.imshow(image, aspect='auto', interpolation='none', extent=extent)
  axes.set_xticks(range(len(names)), names, rotation=90, fontsize=SMALL)
  axes.set_yticks(range(len(options)), options, fontsize=SMALL)
  axes.tick_params(length=0)
  axes.set_xlim(-0.5, per_line - 0.5)
  axes.set_ylim(len(options) - 0.5, -0.5)
  axes.grid(visible=False)


def strength(loss: float, largest: float) -> float:
  """Returns how strong the colour of a loss is, in [0, 1].

  Args:
    loss: of one format.
    largest: of all, which has the strongest colour.
  """
  if loss <= 0 or largest <= 0:
    return 0.0
  return float(np.clip(1 + math.log10(loss / largest) / DECADES, 0, 1))
