"""The style of all figures: colours, type, sizes, and what they have in common.

Figures are pure functions from data to matplotlib figures, without pyplot or state
outside a call. Every colour is one of `PALETTE` and unlike the others, so that a page
can replace them in an SVG by its own, light or dark. A figure of a page is `width`
inches wide, its type as large in a narrow one as in a wide one.
"""

from collections.abc import Sequence
import os

import matplotlib
from matplotlib import patches
from matplotlib.figure import Figure

from fliqs_jax.numerics.formats import find_format
from fliqs_jax.search.options import is_option, split

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
POINTS = 72  # an inch

styled = matplotlib.rc_context(STYLE)  # a decorator of what draws


def family(name: str) -> str:
  """Returns what an option is, as `PALETTE` colours it: a pair as its weights."""
  if not is_option(name):
    return 'architecture'
  family = find_format(split(name).weights).family
  return {'int': 'integer', 'float': 'float', 'unscaled': 'unquantized'}[family]


def shorten(name: str, length: int, start: int | None = None) -> str:
  """Returns a name without its middle and odd characters; its ends tell it apart.

  Args:
    name: of any length.
    length: the most characters to return.
    start: how many of them are the name's first ones; None for a third.
  """
  odd = '\N{REPLACEMENT CHARACTER}'
  printable = ''.join(c if c.isprintable() else odd for c in name)
  if len(printable) <= length:
    return printable
  if start is None:
    start = (length - 1) // 3  # most of what differs is at the end of a path
  return printable[:start] + '…' + printable[start + 1 - length :]


def shorten_all(names: Sequence[str], length: int) -> list[str]:
  """Returns names without their middles, all cut at one place, which keeps them apart.

  Where no place does, the start that long names share is left out too; and where that
  is not enough, those that are alike get their place in the list.
  """
  shared = os.path.commonprefix([name for name in names if len(name) > length])
  usual = (length - 1) // 3
  starts = sorted(range(1, length - 1), key=lambda start: abs(start - usual))
  tries = [
    [_cut(name, length, start, prefix) for name in names]
    for prefix in dict.fromkeys(('', shared))
    for start in starts
  ]
  best = max(tries, key=lambda short: len(set(short)))
  first, short = {}, []  # the first name of each short form
  for name, text in zip(names, best):
    alike = first.setdefault(text, name) != name
    short.append(_numbered(text, names.index(name) + 1, length) if alike else text)
  return short


def _cut(name, length, start, prefix):
  if prefix and len(name) > length:
    return '…' + shorten(name.removeprefix(prefix), length - 1, start)
  return shorten(name, length, start)


def _numbered(text, number, length):
  """Returns a shortened name with a number in its middle."""
  start, _, end = text.partition('…')
  middle = f'…{number}…' if end else f'…{number}'
  end = end[len(middle) - 1 :]
  return start[: length - len(middle) - len(end)] + middle + end


def new_figure(width: float, height: float) -> Figure:
  """Returns an empty figure of this size in inches, to be made in the style."""
  return Figure(figsize=(width, height), layout='constrained')


def add_legend(
  figure: Figure,
  families: Sequence[str],
  extra: Sequence[tuple[str, str]] = (),
  found: str = '',
) -> None:
  """Adds a legend of colours.

  Args:
    figure: to add it to.
    families: colours of options, from `family`; named by themselves.
    extra: further colours and their names.
    found: text before each family's name.
  """
  names = [(name, found + name) for name in dict.fromkeys(families)]
  names += extra
  handles = [patches.Patch(color=PALETTE[colour], label=text) for colour, text in names]
  figure.legend(
    handles=handles,
    loc='outside upper left',
    ncols=4 if figure.get_figwidth() > 6 else 2,
    handlelength=1,
    fontsize=8,
  )
