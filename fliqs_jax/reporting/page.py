"""The report of runs as one HTML page that needs no network, and its figures as PNG."""

from collections.abc import Callable, Sequence
import functools
import importlib.resources
import io
import math
import re
from typing import Any, NamedTuple

from etils import epath
import jinja2
import markupsafe
import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fliqs_jax.reporting import pareto_figure
from fliqs_jax.reporting import figures as report_figures
from fliqs_jax.reporting import text as report_text
from fliqs_jax.reporting import finished_runs as runs_lib
from fliqs_jax.errors import ConfigError
from fliqs_jax.reporting.finished_runs import Run

REPORT_FILE = 'report.html'
_TEMPLATE = 'report.html.jinja'


class Drawing(NamedTuple):
  """A figure of the page, twice: for wide and for narrow windows."""

  name: str  # of the PNG
  alt: str  # what it shows, in words
  wide: markupsafe.Markup  # SVG
  narrow: markupsafe.Markup
  png: bytes


def write(workdirs: Sequence[str], out: str | None = None) -> epath.Path:
  """Writes the report of the runs in these folders and returns where.

  Args:
    workdirs: folders of runs, finished or not; the page is about the first, the others
      are set beside it.
    out: the page; by default `report.html` in the first folder. The PNG go into a
      folder beside it, `report_figures`.

  Raises:
    ConfigError: where a folder holds no run, a file is damaged, or the page cannot be
      written; nothing is written then.
  """
  try:
    runs = [runs_lib.read_run(workdir) for workdir in workdirs]
  except ValueError as error:
    raise ConfigError(str(error)) from None
  path = epath.Path(out) if out else runs[0].workdir / REPORT_FILE
  sections = [_section(run, runs) for run in runs]
  comparison = _comparison(runs) if len(runs) > 1 else None
  page = _template().render(sections=sections, comparison=comparison)
  drawings = [drawing for section in sections for drawing in section['drawings']]
  if comparison and comparison['drawing']:
    drawings.append(comparison['drawing'])
  try:
    folder = path.parent / f'{path.stem}_figures'
    folder.mkdir(parents=True, exist_ok=True)
    for drawing in drawings:
      (folder / f'{drawing.name}.png').write_bytes(drawing.png)
    path.write_bytes(page.encode('utf-8', 'replace'))
  except OSError as error:
    reason = error.strerror or error
    raise ConfigError(f'cannot write the report {str(path)!r}: {reason}') from None
  return path


def _template():
  environment = jinja2.Environment(
    autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
    lstrip_blocks=True,
  )  # fmt: skip
  environment.filters['number'] = report_text.number
  environment.globals.update(
    family=report_figures.family, palette=report_figures.PALETTE
  )
  source = importlib.resources.files('fliqs_jax.reporting').joinpath(_TEMPLATE)
  return environment.from_string(source.read_text(encoding='utf-8'))


def _section(run: Run, runs: Sequence[Run]) -> dict[str, Any]:
  """Returns what the template shows of one run."""
  draw = functools.partial(_draw, f'{runs.index(run)}_')
  uniform = runs_lib.uniform_runs(run, runs)
  section = {
    'run': run,
    'headline': report_text.headline(run, uniform),
    'tiles': report_text.tiles(run),
    'marks': report_text.marks(run),
    'models': [],
    'layers': [],
    'architecture': report_text.architecture(run),
    'decisions': report_text.decisions(run),
    'reference': None,
    'separate': False,
    'settings': report_text.settings(run.config),
    'command': report_text.command(run),
  }
  section |= _found(run, uniform, draw) if run.result else {'found': {}}
  section['progress'] = _progress(run, section, draw)
  section['drawings'] = [*section['found'].values(), *section['progress'].values()]
  return section


def _found(run, uniform, draw):
  """What a result tells: models beside each other, and layers."""
  result = run.result
  reference = runs_lib.reference_format(result)
  models = report_text.models(run, uniform)
  layers = report_text.layers(result, reference)
  unit, target = result['cost_unit'], result.get('target')
  found = {}
  if len(models) > 1:
    found['scale'] = draw(
      'cost',
      report_text.scale_alt(models, target, unit),
      functools.partial(report_figures.cost_scale, models, target or math.nan, unit),
    )
  if layers:
    found['formats'] = draw(
      'formats',
      report_text.formats_alt(layers),
      functools.partial(report_figures.layer_formats, layers),
    )
  if layers and all(layer['reference_cost'] is not None for layer in layers):
    found['costs'] = draw(
      'layer_costs',
      report_text.costs_alt(layers, reference),
      functools.partial(
        report_figures.layer_costs, layers, f'uniform {reference}', unit
      ),
    )
  return {
    'models': models,
    'layers': layers,
    'separate': any(layer['weights'] != layer['activations'] for layer in layers),
    'reference': reference,
    'found': found,
  }


def _progress(run, section, draw):
  """What a history tells: the policy and scalars over the steps."""
  if not run.history:
    return {}
  steps = [row['step'] for row in run.history]
  progress = {}
  if section['decisions']:
    progress['policy'] = draw(
      'policy',
      report_text.policy_alt(section['decisions'], steps),
      functools.partial(
        report_figures.policy_heat_map, steps, section['decisions'], section['marks']
      ),
    )
  panels = report_text.panels(run)
  if panels:
    progress['curves'] = draw(
      'curves',
      report_text.curves_alt(panels, steps),
      functools.partial(report_figures.curves, steps, panels, section['marks']),
    )
  return progress


def _comparison(runs):
  """What the template shows of several runs, and of those left out of the picture."""
  finished = runs_lib.comparable(runs)
  quality = finished[0].quality.name if finished else ''
  points = runs_lib.points(finished)
  drawing = None
  if len(points) > 1:
    unit = finished[0].result['cost_unit']
    drawing = _draw(
      '',
      'pareto',
      report_text.pareto_alt(points, unit, quality),
      functools.partial(pareto_figure.pareto, points, unit, quality),
    )
  rows = [
    {'run': run, 'point': point} for run, point in zip(finished, points, strict=True)
  ]
  others = [run for run in runs if run not in finished]
  return {'rows': rows, 'others': others, 'drawing': drawing, 'quality': quality}


def _draw(prefix: str, name: str, alt: str, figure: Callable[..., Figure]) -> Drawing:
  """Returns a drawing of a figure that takes a width."""
  name = prefix + name
  wide = _laid_out(figure(width=report_figures.WIDE))
  narrow = _laid_out(figure(width=report_figures.NARROW))
  return Drawing(
    name=name,
    alt=alt,
    wide=to_svg(wide, f'{name}-wide', alt),
    narrow=to_svg(narrow, f'{name}-narrow', alt),
    png=to_png(wide),
  )


def _laid_out(figure):
  """Lays a figure out once, and not again for every file that is written of it."""
  FigureCanvasAgg(figure)
  with matplotlib.rc_context(report_figures.STYLE):
    figure.get_layout_engine().execute(figure)
  figure.set_layout_engine('none')
  return figure


def to_svg(figure: Figure, salt: str, alt: str) -> markupsafe.Markup:
  """Returns a figure as an SVG element whose colours are the page's.

  Args:
    figure: with the colours of `report_figures.PALETTE`.
    salt: unlike that of any other figure of the page, for the ids within.
    alt: what it shows, for those who cannot see it.
  """
  buffer = io.StringIO()
  nothing = dict.fromkeys(('Creator', 'Date', 'Format', 'Type'))
  with matplotlib.rc_context({**report_figures.STYLE, 'svg.hashsalt': salt}):
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
  for name, colour in report_figures.PALETTE.items():
    style = style.replace(colour, f'var(--{name})')
  return style


def to_png(figure: Figure) -> bytes:
  """Returns a figure as a PNG file, on a light ground."""
  buffer = io.BytesIO()
  with matplotlib.rc_context(report_figures.STYLE):
    figure.savefig(
      buffer, format='png', dpi=140, facecolor=report_figures.PALETTE['surface'],
      metadata={'Software': None},
    )  # fmt: skip
  return buffer.getvalue()
