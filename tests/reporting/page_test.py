"""The report: what it says of a run, and that a browser shows all of it."""

import json
import re
import shlex

from absl import flags
import browser as browser_lib
from conftest import load_config
from etils import epath
from made_up_runs import OPTIONS, write_run
from matplotlib.collections import LineCollection
from ml_collections import config_flags
import numpy as np
import pytest
import whole_runs

from fliqs_jax import command_line, models
from fliqs_jax.errors import ConfigError
from fliqs_jax.reporting import (
  comparison,
  figure_style,
  layer_figures,
  pareto_figure,
  summary,
  tables,
  terminal,
  training_figures,
)
from fliqs_jax.reporting.page import REPORT_FILE, write_report
from fliqs_jax.reporting.recorded_run import read_run
from fliqs_jax.runs import baseline, loop
from fliqs_jax.runs.config import resolve
from fliqs_jax.runs.result import RESULT_FILE, config_to_json
from fliqs_jax.runs.sessions import SESSIONS_FILE
from fliqs_jax.runs.validation import OWN_BATCHES
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


@pytest.mark.parametrize('length', [17, 20, 28])
def test_names_stay_apart_wherever_they_differ(length):
  blocks = [f'transformer/decoder/block{i}/attention/projection/{end}'
            for i in range(12) for end in ('query', 'key')]  # fmt: skip
  middles = [f'network/stage/part_{part}/of/a/long/path/kernel' for part in 'abc']
  both = [f'{a}{"x" * 40}{b}{"x" * 40}{c}' for a in 'ab' for b in 'ab' for c in 'ab']
  for names in (blocks, middles, both, ['a', 'a' * 50, 'a' * 51]):
    short = figure_style.shorten_all([*names, names[0]], length)
    assert len({*short}) == len(names) and max(map(len, short)) <= length
    assert short[-1] == short[0]  # what is alike stays alike
    if names in (blocks, middles):  # where a cut is enough, no numbers are given
      assert not any(re.search('…[0-9]+…', text) for text in short)


def test_the_targets_line_crosses_no_label():
  models = [
    {'label': f'uniform {i}', 'cost': cost, 'note': '97.5%', 'found': i == 1}
    for i, cost in enumerate((0.0020, 0.0048, 0.0070))
  ]
  figure = layer_figures.cost_scale(models, 0.0049, 'GBOPs')
  figure.draw_without_rendering()
  (axes,) = figure.axes
  (line,) = axes.lines
  assert axes.get_xlabel() == 'cost (MBOPs)'
  assert list(line.get_xdata()) == [4.9, 4.9]
  at = line.get_window_extent()
  (notes,) = axes.child_axes
  labels = [*notes.get_yticklabels(), *axes.get_yticklabels(), *axes.texts]
  assert '97.5%' in [label.get_text() for label in labels]
  for label in labels:
    box = label.get_window_extent()
    assert not label.get_text() or box.x1 < at.x0 or box.x0 > at.x1


def test_the_page_says_when_how_long_and_on_what(tmp_path):
  folder = write_run(tmp_path / 'run', ['a'])
  assert summary.circumstances(read_run(folder)) == ''
  session = {'first_step': 0, 'steps': 20, 'device': 'TPU v5e', 'num_devices': 8}
  lines = [
    {'date': '2026-11-27T04:22:05Z', 'seconds': 3000.4, **session},
    'cut off',
    {'date': '2026-11-28T14:02:00Z', 'seconds': 1000.0, **session},
  ]
  path = folder / SESSIONS_FILE
  path.write_text('\n'.join(map(json.dumps, lines)))
  assert summary.circumstances(read_run(folder)) == (
    '2026-11-27 04:22 UTC, 1 h 6 min on 8 TPU v5e devices, in 2 sessions, the last of '
    '2026-11-28 14:02 UTC; 30 steps, seed 0.'
  )
  assert '1 h 6 min on 8 TPU v5e devices' in write_report([str(folder)]).read_text()


def test_runs_are_compared_with_steps_seeds_and_errors(tmp_path):
  runs = [
    write_run(tmp_path / name, ['a', 'b'], config={'seed': seed}, cost=cost)
    for name, seed, cost in (('one', 7, 0.02), ('two', 8, 0.04))
  ]
  text = write_report([str(run) for run in runs]).read_text()
  cells = re.findall(r'<th scope="row">(one|two)</th>(.*?)</tr>', text)
  # 75 % of 300 examples: sqrt(0.75 · 0.25 / 300) is 2.5 points.
  rows = [re.findall('<td[^>]*>(.*?)</td>', row)[2:] for _, row in cells]
  assert rows == [
    ['30', '7', '20', '75.00% ± 2.50', 'yes'],
    ['30', '8', '40', '75.00% ± 2.50', 'no'],
  ]
  points = comparison.points([read_run(run) for run in runs])
  figure = pareto_figure.pareto(points, 'GBOPs', 'accuracy')
  bars = [drawn for drawn in figure.axes[0].collections
          if isinstance(drawn, LineCollection)]  # fmt: skip
  heights = [np.ptp(segment[:, 1]) for bar in bars for segment in bar.get_segments()]
  np.testing.assert_allclose(heights, [0.05, 0.05])


def test_the_widest_uniform_model_within_the_target_is_the_baseline():
  costs = {'int2': 4.0, 'e2m0': 4.0, 'int4': 16.0, 'e2m1': 16.0, 'int8': 64.0}
  for target, name in ((4.0, 'int2'), (20.0, 'int4'), (99.0, 'int8'), (1.0, 'int2')):
    assert baseline.widest_format({'uniform_costs': costs, 'target': target}) == name
  assert baseline.widest_format({'uniform_costs': {}, 'target': None}) is None


def test_a_baseline_is_trained_beside_and_shown(tmp_path, data_dir, monkeypatch):
  monkeypatch.setitem(models.MODELS, 'smallest', whole_runs.Smallest)
  folder = write_run(tmp_path / 'run', ['a', 'b'], target=40.0)  # int4 costs 32
  path = folder / CONFIG_FILE
  config = json.loads(path.read_text())
  config['model'] |= {'name': 'smallest'}
  config['input']['data_dir'] = str(data_dir)
  config |= {'num_steps': 2, 'batch_size': 32, 'eval_batch_size': 360, 'seed': 9}
  config['search'] |= {'statistics_batches': 1, 'policy_delay': 1, 'commit_step': 2}
  path.write_text(json.dumps(config))
  text = write_report([str(folder)]).read_text()
  assert 'report --workdir=. --baseline' in text and 'uniform_int4' not in text
  plan = baseline.plan(str(folder))
  result = loop.run(*plan)
  assert result['formats']['conv'] == {'weights': 'int4', 'activations': 'int4'}
  assert (result['steps'], result['seed']) == (2, 9)
  text = write_report([str(folder)]).read_text()
  assert '--baseline' not in text and '<th scope="row">run/uniform_int4</th>' in text
  # The same again is finished at once, as any run.
  monkeypatch.setattr(loop, '_train', None)
  assert loop.run(*baseline.plan(str(folder))) == result


def test_phases_of_a_baseline_are_those_of_a_training(tmp_path):
  given = {'search': {'activation_delay': 7}, 'formats': ''}
  folder = write_run(tmp_path / 'run', ['a'], config=given)
  config, _ = baseline.plan(str(folder))
  plain = load_config('resnet18', 'digits')
  plain.update(mode='train', formats='int4', num_steps=30, **{'search': {
      'activation_delay': 7}})  # fmt: skip
  assert config_to_json(resolve(config)) == config_to_json(resolve(plain))


def test_what_has_no_baseline_says_so(tmp_path):
  own = write_run(tmp_path / 'own', ['a', 'b'], config={'dataset': OWN_BATCHES})
  with pytest.raises(ConfigError, match=r"fliqs_jax.train\(..., formats='int4', "):
    baseline.plan(str(own))
  text = write_report([str(own)]).read_text()
  assert "formats='int4', workdir='../own_int4'" in text and '--baseline' not in text
  fixed = write_run(tmp_path / 'fixed', ['a'], mode='train', target=None)
  (own / RESULT_FILE).unlink()
  for folder in (fixed, own):
    with pytest.raises(ConfigError, match='holds no finished search'):
      baseline.plan(str(folder))


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
  notes = [row['note'] for row in summary.models(run, {'int4': other})]
  assert '2.5 bits per byte' in notes and '2.75 bits per byte' in notes


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
    ('config.json', '{"mode": "search"}', "no usable 'dataset'"),
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


def test_evaluations_meanwhile_are_dots_in_the_training_figure(tmp_path):
  folder = write_run(tmp_path / 'run', ['a'])
  path = folder / HISTORY_FILE
  rows = [json.loads(line) for line in path.read_text().splitlines()]
  rows[1] |= {'eval_accuracy': 0.6, 'eval_loss': 0.25}
  path.write_text('\n'.join(map(json.dumps, rows)))
  run = read_run(folder)
  panels = tables.panels(run)
  assert panels['Training accuracy']['evaluated'] == [(20, 0.6)]
  assert panels['Reward']['evaluated'] == []
  figure = training_figures.curves([10, 20, 30], panels)
  drawn = {axes.get_title('left').partition(':')[0]: axes.lines for axes in figure.axes}
  _, dots = drawn['Training loss']
  assert (list(dots.get_xdata()), list(dots.get_ydata())) == ([20], [0.25])
  assert len(drawn['Reward']) == 1
  text = write_report([str(folder)]).read_text()
  assert 'Dots are evaluations meanwhile' in text
  assert 'evaluations meanwhile end at: Training loss 0.25, Training accu' in text


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
