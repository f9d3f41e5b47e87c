"""The style of all figures: colours, type, sizes, and what they have in common.

Figures are pure functions from data to matplotlib figures, without pyplot or state
outside a call. Every colour is one of `PALETTE` and unlike the others, so that a page
can replace them in an SVG by its own, light or dark. A figure of a page is `width`
inches wide, its type as large in a narrow one as in a wide one.
"""

from collections.abc import Sequence

import matplotlib
from matplotlib import patches
from matplotlib.figure import Figure

from fliqs_jax.numerics.formats import find_format, is_format

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
  """Returns what an option is, as `PALETTE` colours it."""
  if not is_format(name):
    return 'architecture'
  family = find_format(name).family
  return {'int': 'integer', 'float': 'float', 'unscaled': 'unquantized'}[family]


def shorten(name: str, length: int) -> str:
  """Returns a name without its middle and odd characters; its ends tell it apart."""
  odd = '\N{REPLACEMENT CHARACTER}'
  printable = ''.join(c if c.isprintable() else odd for c in name)
  if len(printable) <= length:
    return printable
  start = (length - 1) // 3  # most of what differs is at the end of a path
  return printable[:start] + '…' + printable[start + 1 - length :]


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
