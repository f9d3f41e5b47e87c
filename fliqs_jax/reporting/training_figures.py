"""Figures of a run's history over its steps: the policy, and scalars."""

from collections.abc import Mapping, Sequence
import math
from typing import Any, NamedTuple

from matplotlib import colors, ticker
from matplotlib.figure import Figure
import numpy as np

from fliqs_jax.reporting.figure_style import (
  PALETTE,
  POINTS,
  SMALL,
  WIDE,
  add_legend,
  family,
  new_figure,
  shorten,
  shorten_all,
  styled,
)


class Milestone(NamedTuple):
  """A step at which a run changed, drawn as a line with a letter."""

  step: int
  letter: str
  meaning: str


@styled
def policy_heat_map(
  steps: Sequence[int],
  decisions: Sequence[Mapping[str, Any]],
  milestones: Sequence[Milestone] = (),
  width: float = WIDE,
) -> Figure:
  """Draws the probability of every option of every decision over the steps.

  Args:
    steps: of the T lines of a history.
    decisions: `name`, `options`, `probabilities` `[T][K]` and `found` (an option, or
      None) of each. The options are drawn in their order, the last one on top.
    milestones: where the run changed.
    width: in inches.
  """
  image, bands = _heat_image(np.asarray(steps), decisions)
  fewest = min(len(decision['options']) for decision in decisions)
  # Type needs its height: of every option where there is room, else of decisions.
  row = max(min(SMALL + 1, 1500 / len(image)), (SMALL + 1.5) / fewest)
  figure = new_figure(width, 0.8 + row * len(image) / POINTS)
  axes = figure.subplots()
  axes.imshow(
    image, aspect='auto', interpolation='none', extent=(0, steps[-1], len(image), 0)
  )
  axes.set_yticks(
    [top + len(d['options']) / 2 for top, d in zip(bands, decisions)],
    shorten_all([d['name'] for d in decisions], 34 if width > 6 else 17),
  )
  axes.tick_params(axis='y', length=0, labelsize=SMALL, labelcolor=PALETTE['ink'])
  axes.spines['left'].set_visible(False)
  axes.grid(visible=False)
  for top, decision in zip(bands, decisions):
    _name_options(axes, decision, top, row, steps[-1])
  _draw_milestones(axes, milestones, steps[-1])
  _step_axis(axes, 8 if width > 6 else 4)
  options = {option for decision in decisions for option in decision['options']}
  add_legend(figure, sorted(map(family, options)))
  return figure


def _name_options(axes, decision, top, row, last):
  """Marks the option found, and names it, or all options where there is room.

  Args:
    axes: the heat map's, with a unit of height for each option.
    decision: as `policy_heat_map` takes it.
    top: its first row.
    row: height of a row, in points.
    last: the last step.
  """
  labelled = row >= SMALL
  half = SMALL / row / 2  # of a name's height, in rows: names stay with their decision
  options = decision['options']
  for place, option in enumerate(reversed(options)):
    middle, found = top + place + 0.5, option == decision['found']
    if found:
      axes.plot(
        last, middle, '<', color=PALETTE['ink'], markersize=min(5, row), clip_on=False
      )
    if labelled or found:
      near = np.clip(middle, top + half, top + len(options) - half)
      axes.annotate(
        shorten(option, 8),
        (last, near),
        (8, 0),
        fontsize=SMALL - 1,
        textcoords='offset points',
        va='center',
        color=PALETTE['muted'],
        annotation_clip=False,
      )


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


@styled
def curves(
  steps: Sequence[int],
  panels: Mapping[str, Mapping[str, Any]],
  milestones: Sequence[Milestone] = (),
  width: float = WIDE,
) -> Figure:
  """Draws scalars over the steps, a panel for each.

  Args:
    steps: of the T lines of a history.
    panels: by title, `values` `[T]`, `format` (of a number), `reference`, a value to
      draw a line at, or None, and `evaluated`, pairs (step, value), drawn as dots.
    milestones: where the run changed.
    width: in inches.
  """
  columns = min(3 if width > 6 else 1, len(panels))
  rows = math.ceil(len(panels) / columns)
  figure = new_figure(width, 1.9 * rows + 0.1)
  grid = figure.subplots(rows, columns, squeeze=False, sharex=True).flat
  for axes, (title, panel) in zip(grid, panels.items()):
    axes.plot(steps, panel['values'], color=PALETTE['accent'], linewidth=1.6)
    if len(steps) == 1:
      axes.plot(steps, panel['values'], 'o', color=PALETTE['accent'], clip_on=False)
    if panel['reference'] is not None:
      axes.axhline(
        panel['reference'], color=PALETTE['ink'], linewidth=1, linestyle=(0, (4, 3))
      )
    if panel['evaluated']:
      axes.plot(*zip(*panel['evaluated']), 'o', color=PALETTE['float'], markersize=4)
    last = panel['format'].format(panel['values'][-1])
    axes.set_title(f'{title}: {last} at step {steps[-1]:,}', pad=SMALL + 6)
    axes.margins(y=0.12)
    axes.set_xlim(0, steps[-1])
    axes.yaxis.set_major_locator(ticker.MaxNLocator(4))
    percent = ticker.PercentFormatter(1)
    axes.yaxis.set_major_formatter(percent if '%' in panel['format'] else '{x:g}')
    _draw_milestones(axes, milestones, steps[-1])
    _step_axis(axes, 5)
    axes.tick_params(labelbottom=True)
  for axes in list(grid)[len(panels) :]:
    axes.set_visible(False)
  return figure


def _step_axis(axes, num_ticks):
  axes.xaxis.set_major_locator(ticker.MaxNLocator(num_ticks, integer=True))
  axes.xaxis.set_major_formatter('{x:,.0f}')
  axes.set_xlabel('step')


def _draw_milestones(axes, milestones, last):
  """Draws lines, and above them their letters, those of near steps as one word."""
  shown = sorted(milestone for milestone in milestones if 0 < milestone.step <= last)
  words = []  # [first step, letters]
  for milestone in shown:
    axes.axvline(milestone.step, color=PALETTE['muted'], linewidth=0.8, linestyle=':')
    if words and milestone.step - words[-1][0] < 0.04 * last:
      words[-1][1] += milestone.letter
    else:
      words.append([milestone.step, milestone.letter])
  for step, letters in words:
    axes.annotate(
      letters,
      (step, 1),
      (0, 2),
      xycoords=('data', 'axes fraction'),
      textcoords='offset points',
      ha='center',
      va='bottom',
      fontsize=SMALL,
      color=PALETTE['muted'],
    )
