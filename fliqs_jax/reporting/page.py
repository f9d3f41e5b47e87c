"""The report of runs as one HTML page that needs no network, and its figures as PNG."""

from collections.abc import Callable, Sequence
import functools
import importlib.resources
import math
from typing import Any, NamedTuple

from etils import epath
import jinja2
import markupsafe
from matplotlib.figure import Figure

from fliqs_jax.errors import ConfigError
from fliqs_jax.reporting import (
  alt_text,
  comparison,
  figure_style,
  front_figure,
  layer_figures,
  pareto_figure,
  quality_budget,
  rendering,
  sensitivities,
  sensitivity_figure,
  summary,
  tables,
  training_figures,
  units,
)
from fliqs_jax.reporting.recorded_run import Run, read_run
from fliqs_jax.runs import baseline, exports, files
from fliqs_jax.runs import quality as quality_lib

REPORT_FILE = 'report.html'
_TEMPLATE = 'report.html.jinja'


class Drawing(NamedTuple):
  """A figure of the page, twice: for wide and for narrow windows."""

  name: str  # of the PNG
  alt: str  # what it shows, in words
  wide: markupsafe.Markup  # SVG
  narrow: markupsafe.Markup
  png: bytes


def write_report(workdirs: Sequence[str], out: str | None = None) -> epath.Path:
  """Writes the report of the runs in these folders and returns where.

  Args:
    workdirs: folders of runs, finished or not; the page is about the first, the others
      are set beside it, and so are uniform models trained in their folders.
    out: the page; by default `report.html` in the first folder. The PNG go into a
      folder beside it, `report_figures`.

  Raises:
    ConfigError: where a folder holds no run, a file is damaged, or the page cannot be
      written; nothing is written then.
  """
  runs = comparison.with_baselines([read_run(workdir) for workdir in workdirs])
  path = files.to_path(out) if out else runs[0].workdir / REPORT_FILE
  sections = [_section(run, runs) for run in runs]
  together = _comparison(runs) if len(runs) > 1 else None
  page = _template().render(sections=sections, comparison=together)
  drawings = [drawing for section in sections for drawing in section['drawings']]
  if together and together['drawing']:
    drawings.append(together['drawing'])
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
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  environment.filters['number'] = summary.number
  environment.globals.update(
    family=figure_style.family,
    palette=figure_style.PALETTE,
    exported_quality=_exported_quality,
    arithmetic=exports.arithmetic_text,
  )
  source = importlib.resources.files('fliqs_jax.reporting').joinpath(_TEMPLATE)
  return environment.from_string(source.read_text(encoding='utf-8'))


def _exported_quality(report):
  counted = {'num_examples': report['examples']}
  return quality_lib.from_evaluation(report['eval'] | counted)


def _section(run: Run, runs: Sequence[Run]) -> dict[str, Any]:
  """Returns what the template shows of one run."""
  draw = functools.partial(_draw, f'{runs.index(run)}_')
  uniform = comparison.uniform_runs(run, runs)
  section = {
    'run': run,
    'headline': summary.headline(run, uniform),
    'circumstances': summary.circumstances(run),
    'tiles': summary.tiles(run),
    'milestones': tables.milestones(run),
    'models': [],
    'missing': None,
    'layers': [],
    'sensitivities': [],
    'architecture': tables.architecture(run),
    'decisions': tables.decisions(run),
    'reference': None,
    'separate': False,
    'panels': tables.panels(run),
    'settings': tables.settings(run.config),
    'command': tables.command(run),
  }
  section |= _found(run, uniform, draw) if run.result else {'found': {}}
  section['evaluated'] = any(p['evaluated'] for p in section['panels'].values())
  section['progress'] = _progress(run, section, draw)
  section['drawings'] = [*section['found'].values(), *section['progress'].values()]
  return section


def _found(run, uniform, draw):
  """Returns rows and figures of a result: of models by cost, and of layers."""
  result = run.result
  reference = comparison.reference_format(result)
  models = summary.models(run, uniform)
  layers = tables.layers(result, reference)
  costs = [layer[of] or 0 for layer in layers for of in ('cost', 'reference_cost')]
  unit, target = result['cost_unit'], result.get('target')
  found = {}
  if len(models) > 1:
    found['scale'] = draw(
      'cost',
      alt_text.scale(models, target, unit),
      functools.partial(layer_figures.cost_scale, models, target or math.nan, unit),
    )
  if layers:
    found['formats'] = draw(
      'formats',
      alt_text.formats(layers),
      functools.partial(layer_figures.layer_formats, layers),
    )
  if layers and all(layer['reference_cost'] is not None for layer in layers):
    found['costs'] = draw(
      'layer_costs',
      alt_text.costs(layers, reference),
      functools.partial(
        layer_figures.layer_costs, layers, f'uniform {reference}', unit
      ),
    )
  missing = baseline.widest_format(result)
  rows = sensitivities.rows(result)
  return {
    'models': models,
    'missing': None if missing in uniform else missing,
    'front': quality_budget.words(result),
    'layers': layers,
    'layer_unit': units.choose(costs, unit),
    'sensitivities': rows,
    'most_sensitive': sensitivities.words(result),
    'lost_quality': sensitivities.lost_quality(result) if rows else '',
    'separate': any(layer['weights'] != layer['activations'] for layer in layers),
    'reference': reference,
    'found': found | _measured(result, rows, draw),
  }


def _measured(result, rows, draw):
  """Returns figures of what was measured on the way to a result, by name."""
  found = {}
  if rows:
    chosen = tables.chosen(result)
    found['sensitivities'] = draw(
      'sensitivities',
      alt_text.sensitivities(result),
      functools.partial(sensitivity_figure.sensitivity_map, rows, chosen),
    )
  if result.get('front'):
    found['front'] = draw(
      'front',
      alt_text.front(result),
      functools.partial(
        front_figure.lost_quality,
        result['front'],
        quality_budget.limit_of(result),
        result['cost_unit'],
        quality_budget.lost_quality(result),
      ),
    )
  return found


def _progress(run, section, draw):
  """Returns figures of a history: of the policy and of scalars over the steps."""
  if not run.history:
    return {}
  steps = [row['step'] for row in run.history]
  progress = {}
  if section['decisions']:
    progress['policy'] = draw(
      'policy',
      alt_text.policy(section['decisions'], steps),
      functools.partial(
        training_figures.policy_heat_map,
        steps,
        section['decisions'],
        section['milestones'],
      ),
    )
  panels = section['panels']
  if panels:
    progress['curves'] = draw(
      'curves',
      alt_text.curves(panels, steps),
      functools.partial(training_figures.curves, steps, panels, section['milestones']),
    )
  return progress


def _comparison(runs):
  """Returns what the template shows of several runs, also of those not drawn."""
  finished = comparison.comparable(runs)
  quality = finished[0].quality.name if finished else ''
  points = comparison.points(finished)
  unit = finished[0].result['cost_unit'] if finished else ''
  drawing = None
  if len(points) > 1:
    title = comparison.title(finished)
    drawing = _draw(
      '',
      'pareto',
      alt_text.pareto(points, unit, quality),
      functools.partial(pareto_figure.pareto, points, unit, quality, title),
    )
  rows = [
    {'run': run, 'point': point} for run, point in zip(finished, points, strict=True)
  ]
  others = [run for run in runs if run not in finished]
  return {
    'rows': rows,
    'others': others,
    'drawing': drawing,
    'quality': quality_lib.to_title(quality),
    'unit': units.choose([point['cost'] for point in points], unit),
  }


def _draw(prefix: str, name: str, alt: str, figure: Callable[..., Figure]) -> Drawing:
  """Returns a drawing of a figure that takes a width."""
  name = prefix + name
  wide = rendering.lay_out(figure(width=figure_style.WIDE))
  narrow = rendering.lay_out(figure(width=figure_style.NARROW))
  return Drawing(
    name=name,
    alt=alt,
    wide=rendering.to_svg(wide, f'{name}-wide', alt),
    narrow=rendering.to_svg(narrow, f'{name}-narrow', alt),
    png=rendering.to_png(wide),
  )
