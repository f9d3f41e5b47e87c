"""Tables and lines as HTML, for the notebooks that show an object."""

from collections.abc import Iterable, Sequence

import markupsafe
from rich.table import Table


def to_html(tables: Iterable[Table], lines: Sequence[str]) -> str:
  """Returns tables of a terminal, and the lines below them, as HTML."""
  paragraphs = (markupsafe.Markup('<div>{}</div>').format(line) for line in lines)
  return '\n'.join([*map(_table, tables), *paragraphs])


def _table(table):
  sides = [
    markupsafe.Markup(' style="text-align: {}"').format(column.justify)
    for column in table.columns
  ]
  head = (column.header for column in table.columns)
  rows = zip(*(column.cells for column in table.columns))
  parts = [_row('th', sides, head), *(_row('td', sides, row) for row in rows)]
  return '<table>\n' + '\n'.join(parts) + '\n</table>'


def _row(tag, sides, cells):
  cell = markupsafe.Markup('<{tag}{side}>{text}</{tag}>')
  texts = (
    cell.format(tag=markupsafe.Markup(tag), side=side, text=str(text))
    for side, text in zip(sides, cells)
  )
  return f'<tr>{"".join(texts)}</tr>'
