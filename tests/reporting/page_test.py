"""The report: what it says of a run, and that a browser shows all of it."""

import json
import re
import shlex

from absl import flags
import browser as browser_lib
from etils import epath
from made_up_runs import OPTIONS, write_run
from ml_collections import config_flags
import pytest
import whole_runs

from fliqs_jax import command_line
from fliqs_jax.errors import ConfigError
from fliqs_jax.reporting import (
  comparison,
  figure_style,
  layer_figures,
  summary,
  tables,
  terminal,
  training_figures,
)
from fliqs_jax.reporting.page import REPORT_FILE, write_report
from fliqs_jax.reporting.recorded_run import read_run
from fliqs_jax.runs.config import resolve
from fliqs_jax.runs.result import RESULT_FILE, config_to_json
from fliqs_jax.runs.workdir import CONFIG_FILE, HISTORY_FILE, read_history

HOSTILE = '<script>alert("layer")</script>&$x^2$%"\'>\ud800-->'

# Of everything drawn: its size, and how many marks are in it.
DRAWN = """[...document.querySelectorAll('svg.figure')]
  .filter(svg => getComputedStyle(svg.parentElement).display != 'none')
  .map(svg => [svg.getAttribute('aria-label'), svg.getBoundingClientRect().width,
    svg.getBoundingClientRect().height,
    svg.querySelectorAll('path, image, use, text').length])"""


@pytest.fixture(scope='module')
def browser(tmp_path_factory):
  if browser_lib.EXECUTABLE is None:
    pytest.skip('no Chromium is installed: apt install chromium')
  with browser_lib.Browser(tmp_path_factory.mktemp('profile')) as browser:
    yield browser


@pytest.fixture(scope='module')
def page(tmp_path_factory):
  """The report of a search, beside a hostile, an unfinished and a fixed one."""
  folder = tmp_path_factory.mktemp('runs')
  write_run(folder / 'search', [f'stage1/block{i}/conv' for i in range(7)])
  write_run(folder / f'hostile {HOSTILE[:8]}', [HOSTILE, 'b', 'c', 'd'])
  unfinished = write_run(folder / 'unfinished', ['a', 'b'])
  (unfinished / RESULT_FILE).unlink()
  write_run(folder / 'fixed', ['a'], mode='train', target=None, uniform_costs={})
  return write_report([str(path) for path in sorted(folder.iterdir())[::-1]])


@pytest.mark.parametrize('width, dark', [(1280, False), (400, True)])
def test_a_browser_shows_all_of_it(page, browser, width, dark):
  browser.complaints.clear()
  browser.requests.clear()
  browser.open(page, width, dark)
  browser.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
  assert browser.evaluate('document.documentElement.scrollWidth') <= width
  drawn = browser.evaluate(DRAWN)
  # Of the search and the hostile one each five, of the unfinished and of the fixed one
  # two, and the picture of all: `1 + 5 + 5 + 2 + 2`.
  assert len(drawn) == 15
  for label, *numbers in drawn:
    assert len(label) > 20
    drawn_width, height, marks = numbers
    assert width / 2 < drawn_width < width and height > 50 and marks > 10, label
  background = browser.evaluate('getComputedStyle(document.body).backgroundColor')
  ink = browser.evaluate(
    "getComputedStyle(document.querySelector('svg text')).fill.match(/\\d+/g)[0]"
  )
  assert (int(re.search(r'\d+', background)[0]) < 128) == dark != (int(ink) < 128)
  assert browser.complaints == []
  assert {url.partition(':')[0] for url in browser.requests} <= {'file', 'data'}


def test_names_from_files_are_text(page, browser):
  assert '<script' not in page.read_text()
  browser.open(page, 1280)
  rows = browser.evaluate(
    "[...document.querySelectorAll('th')].map(e => e.textContent)"
  )
  assert any(row.startswith('<script>alert("layer")</script>&$x^2$%') for row in rows)


def test_figures_are_files_too(page):
  pictures = list((page.parent / 'report_figures').glob('*.png'))
  assert len(pictures) == 15
  assert all(p.read_bytes().startswith(b'\x89PNG') for p in pictures)


def test_two_hundred_layers_are_drawn_in_rows_with_every_name(tmp_path):
  names = [f'stage{i // 20}_block{i % 20}/conv' for i in range(200)]
  run = read_run(write_run(tmp_path / 'run', names))
  layers = tables.layers(run.result, 'int4')
  for width in (figure_style.WIDE, figure_style.NARROW):
    drawn = [
      label.get_text()
      for axes in layer_figures.layer_formats(layers, width).axes
      for label in axes.get_xticklabels()
    ]
    assert [text for text in drawn if text] == [
      figure_style.shorten(name, 28 if width == figure_style.WIDE else 20)
      for name in names
    ]


def test_bars_are_as_high_as_formats_have_bits(tmp_path):
  run = read_run(write_run(tmp_path / 'run', ['a', 'b', 'c', 'd']))
  layers = tables.layers(run.result, 'int4')
  # Costs are bits squared: 4 + 16 + 64 + 256.
  assert [layer['share'] for layer in layers] == [
    4 / 340,
    16 / 340,
    64 / 340,
    256 / 340,
  ]
  (axes,) = layer_figures.layer_formats(layers).axes
  heights = [bar.get_height() for bar in axes.patches]
  assert heights[1::2] == [2, 4, 8, 16]  # before each, the one of its share
  assert heights[::2] == [0.25, 1, 4, 16]  # the largest share as high as 16 bits


def heat_map(num_decisions):
  """The texts right of the policy of decisions whose third option was found."""
  decision = {'options': OPTIONS, 'probabilities': [[0.25] * 4], 'found': OPTIONS[2]}
  decisions = [{**decision, 'name': f'layer{i}'} for i in range(num_decisions)]
  steps = {'a': 10, 'p': 11, 'c': 90}
  milestones = [training_figures.Milestone(s, c, '') for c, s in steps.items()]
  (axes,) = training_figures.policy_heat_map([100], decisions, milestones).axes
  return [text.get_text() for text in axes.texts]


def test_a_heat_map_names_every_option_or_at_least_what_was_found():
  letters = ['ap', 'c']  # of steps too near to stand side by side
  assert heat_map(2) == [*OPTIONS[::-1] * 2, *letters]
  assert heat_map(100) == [OPTIONS[2]] * 100 + letters


def test_names_are_told_apart_by_both_ends():
  names = [f'{part}/transformer/layers/block0/mlp/{end}'
           for part in ('encoder', 'decoder') for end in ('up', 'down')]  # fmt: skip
  short = [figure_style.shorten(name, 20) for name in names]
  assert len({*short}) == 4 and {len(text) for text in short} == {20}
  assert figure_style.shorten('short', 5) == 'short'


def test_bits_of_a_weight_are_weighted_by_parameters(tmp_path):
  folder = write_run(tmp_path / 'run', ['a', 'b'])  # in int2 and int4
  path = folder / RESULT_FILE
  result = json.loads(path.read_text())
  result['layers']['a']['params'], result['layers']['b']['params'] = 300, 100
  path.write_text(json.dumps(result))
  (*_, (_, bits, remark)) = summary.tiles(read_run(folder))
  # (300 · 2 + 100 · 4) / 400 bits, of 32 and of 16.
  assert bits == '2.50'
  assert remark == '125 bytes, 7.8% of float32 and 15.6% of bf16'


def test_a_metric_of_the_users_called_accuracy_is_shown_as_it_is(tmp_path):
  evaluation = {'accuracy': 90.0, 'quality': -1.5, 'loss': 1.5, 'num_examples': 300}
  folder = write_run(tmp_path / 'run', ['a'], eval=evaluation)
  path = folder / HISTORY_FILE
  rows = [json.loads(line) for line in path.read_text().splitlines()]
  for row, accuracy in zip(rows, (0.5, 40.0, 90.0)):
    row.update(accuracy=accuracy, quality=-2.0)
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  run = read_run(folder)
  assert 'Training quality' in tables.panels(run)
  assert 'Training accuracy' not in tables.panels(run)
  *_, line = terminal.summary_lines({**run.result, 'caps': ()})
  assert line.startswith('One-shot accuracy: 90, quality: -1.5 of 300 examples')


def test_of_bits_per_byte_the_page_says_which_way_is_better(tmp_path):
  evaluation = {'bits_per_byte': 2.5, 'loss': 1.7, 'num_examples': 300}
  run = read_run(write_run(tmp_path / 'run', ['a', 'b'], eval=evaluation))
  other = write_uniform_run(tmp_path / 'int4', 'int4', 32.0, eval=evaluation | {
      'bits_per_byte': 2.75})  # fmt: skip
  assert summary.tiles(run)[0][1:] == ('2.5', 'lower is better, 300 examples')
  headline = summary.headline(run, {'int4': other})
  assert headline.endswith('gets 2.75: 0.25 more, which is worse.')


def test_models_of_one_cost_share_a_bar(tmp_path):
  costs = {'int4': 16.0, 'e2m1': 16.0, 'e3m0': 16.0, 'int8': 64.0, 'e4m3': 64.0}
  run = read_run(write_run(tmp_path / 'run', ['a'], uniform_costs=costs))
  labels = [row['label'] for row in summary.models(run, {}) if not row['found']]
  assert labels == ['uniform int4, e2m1, …', 'uniform int8, e4m3']


def write_uniform_run(folder, name, cost, **fields):
  formats = {layer: dict.fromkeys(('weights', 'activations'), name) for layer in 'ab'}
  fixed = {'mode': 'train', 'target': None, 'uniform_costs': {}, 'formats': formats}
  return read_run(write_run(folder, ['a', 'b'], cost=cost, **fixed, **fields))


def test_uniform_models_stand_beside_the_search(tmp_path):
  search = read_run(write_run(tmp_path / 'search', ['a', 'b']))
  evaluation = {'accuracy': 0.70, 'loss': 1.0, 'num_examples': 300}
  uniform = write_uniform_run(tmp_path / 'int4', 'int4', 32.0, eval=evaluation)
  another = {'model': {'width': 0.5}}
  wider = write_uniform_run(tmp_path / 'wider', 'int2', 32.0, config=another)
  found = comparison.uniform_runs(search, [search, uniform, wider])
  assert {name: run.label for name, run in found.items()} == {'int4': 'int4'}
  assert 'gets 70.00%: 5.00 points less.' in summary.headline(search, found)
  assert 'No uniform model' in summary.headline(search, {})
  notes = {row['label']: row['note'] for row in summary.models(search, found)}
  assert notes == {
    'found': '75.00%', 'uniform int2': 'not trained', 'uniform int4': '70.00%',
    'uniform e4m3': 'not trained', 'uniform bf16': 'not trained',
  }  # fmt: skip


@pytest.mark.parametrize(
  'file, content, expected',
  [
    ('config.json', None, 'holds no run'),
    ('config.json', '{"mode": "search"}', "no usable 'num_steps'"),
    ('config.json', '{', 'cannot be read'),
    ('search_result.json', '{"formats"', 'not JSON, or cut off'),
    ('search_result.json', '{"formats": {"a": "int4"}}', "no usable 'model'"),
    ('history.jsonl', 'x\n{"step": 3, "policy": {}}\n', 'line 1'),
    ('history.jsonl', '{"step": "3", "policy": {}}\nx\n', 'line 1'),
    ('history.jsonl', '{"step": 3, "policy": [1]}\n', 'step 3 is unusable'),
    ('history.jsonl', '{"step": 3, "policy": {"a": {"b": "c"}}}\n', 'step 3'),
  ],
)
def test_damaged_files_are_named_in_one_line(tmp_path, file, content, expected):
  folder = write_run(tmp_path / 'run', ['a'])
  if content is None:
    (folder / file).unlink()
  else:
    (folder / file).write_text(content)
  with pytest.raises(ConfigError, match=expected) as error:
    write_report([str(folder)])
  assert len(error.value.problems) == 1
  assert not (folder / REPORT_FILE).exists()


@pytest.mark.parametrize(
  'field, value',
  [
    ('cost', float('nan')),
    ('target', 'int4'),
    ('layers', []),
    ('layers', {'a': 3}),
    ('architecture', 'small'),
    ('uniform_costs', {'int4': float('inf')}),
    ('eval', {'accuracy': 0.5, 'loss': 1.0}),
  ],
)
def test_a_damaged_result_is_named_in_one_line(tmp_path, field, value):
  folder = write_run(tmp_path / 'run', ['a'], **{field: value})
  with pytest.raises(ConfigError, match='is damaged: ') as error:
    write_report([str(folder)])
  assert len(error.value.problems) == 1


@pytest.mark.parametrize('written', [True, False])
def test_architecture_and_groups_have_what_was_found(tmp_path, written):
  folder = write_run(tmp_path / 'run', ['g/a', 'g/b'], architecture={'width': 24})
  path = folder / RESULT_FILE
  result = json.loads(path.read_text())
  for layer in result['layers'].values():
    layer['decisions'] = dict.fromkeys(('weights', 'activations'), 'group')
    if not written:  # as before results had it; names said it
      del layer['decisions']
  group = 'group' if written else 'g'
  result['policy'] = {group: {'int8': 0.9, 'int2': 0.05, 'int4': 0.05}}
  path.write_text(json.dumps(result))
  path = folder / HISTORY_FILE
  decisions = {
    'width': {'16': 0.2, '8': 0.5, '24': 0.3},
    group: {'int8': 0.9, 'int2': 0.1},
  }
  path.write_text(json.dumps({'step': 10, 'policy': decisions}) + '\n')
  width, shared = tables.decisions(read_run(folder))
  assert width['options'] == ['8', '16', '24']
  assert width['found'] == '24' and width['likeliest'] == '8'
  assert shared['options'] == ['int2', 'int8'] and shared['found'] == 'int2'


def test_a_history_that_is_being_written_is_read_up_to_its_last_whole_line(tmp_path):
  folder = write_run(tmp_path / 'run', ['a'])
  with (folder / HISTORY_FILE).open('a') as file:
    file.write('{"step": 40, "lo')
  rows = read_history(epath.Path(folder))
  assert [row['step'] for row in rows] == [10, 20, 30]


def test_the_page_says_how_to_do_the_run_again(tmp_path, monkeypatch):
  write_run(tmp_path / 'run', ['a'])
  folder = (tmp_path / 'run').rename(tmp_path / 'moved')
  _, _, program, *arguments = shlex.split(tables.command(read_run(folder)))
  assert program == 'fliqs_jax.main' and '--workdir=../moved_again' in arguments
  assert str(tmp_path) not in write_report([str(folder)]).read_text()
  monkeypatch.chdir(folder)
  given = command_line.with_run_folders([program, *arguments, '--config.seed=7'])
  values = flags.FlagValues()
  config_flags.DEFINE_config_file('config', flag_values=values, sys_argv=given)
  flags.DEFINE_string('workdir', None, 'Folder.', flag_values=values)
  values(given)
  config = config_to_json(resolve(values.config))
  assert config == json.loads((folder / CONFIG_FILE).read_text()) | {'seed': 7}


def test_the_command(tmp_path):
  folder, out = write_run(tmp_path / 'run', ['a', 'b']), tmp_path / 'page.html'
  result = whole_runs.command('report', f'--workdir={folder}', f'--out={out}')
  assert result.returncode == 0 and f'Report: {out}' in result.stdout
  assert out.exists() and (tmp_path / 'page_figures').is_dir()
  wrong = whole_runs.command('report', f'--workdir={tmp_path}')
  assert wrong.returncode == 2 and 'Traceback' not in wrong.stderr
  assert f"'{tmp_path}' holds no run" in wrong.stderr.splitlines()[-1]
