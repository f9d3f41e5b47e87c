"""Figures as SVG in the colours of a page, and as PNG files."""

import io
import re

import markupsafe
import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fliqs_jax.reporting.figure_style import PALETTE, STYLE


def lay_out(figure: Figure) -> Figure:
  """Lays a figure out once, and not again for every file that is written of it."""
  FigureCanvasAgg(figure)
  with matplotlib.rc_context(STYLE):
    figure.get_layout_engine().execute(figure)
  figure.set_layout_engine('none')
  return figure


def to_svg(figure: Figure, salt: str, alt: str) -> markupsafe.Markup:
  """Returns a figure as an SVG element whose colours are the page's.

  Args:
    figure: with the colours of `PALETTE`.
    salt: unlike that of any other figure of the page, for the ids within.
    alt: what it shows, for those who cannot see it.
  """
  buffer = io.StringIO()
  nothing = dict.fromkeys(('Creator', 'Date', 'Format', 'Type'))
  with matplotlib.rc_context({**STYLE, 'svg.hashsalt': salt}):
    figure.savefig(buffer, format='svg', metadata=nothing)
  text = buffer.getvalue()
  text = text[text.index('<svg') :]
  # The page has this rule, which would hold for all of it.
  text = re.sub(r'<style type="text/css">.*?</style>', '', text, flags=re.S)
  text = re.sub(r'style="[^"]*"', lambda match: _themed(match[0]), text)
  # Names of groups, which come again in every figure, and names in comments.
  text = re.sub(r'(?<=<g) id="[^"]*"|<!--.*?-->', '', text, flags=re.S)
  size = re.search(r'viewBox="[^"]*"', text)[0]
  label = markupsafe.escape(alt)
  opening = f'<svg role="img" aria-label="{label}" {size} class="figure">'
  return markupsafe.Markup(opening + text[text.index('>') + 1 :])


def _themed(style):
  for name, colour in PALETTE.items():
    style = style.replace(colour, f'var(--{name})')
  return style


def to_png(figure: Figure) -> bytes:
  """Returns a figure as a PNG file, on a light ground."""
  buffer = io.BytesIO()
  with matplotlib.rc_context(STYLE):
    figure.savefig(
      buffer,
      format='png',
      dpi=140,
      facecolor=PALETTE['surface'],
      metadata={'Software': None},
    )
  return buffer.getvalue()
