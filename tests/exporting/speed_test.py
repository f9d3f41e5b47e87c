"""Times of the exported network: who is timed, on what, and what is done with them."""

import json
import re
import shutil
import types

from etils import epath
import pytest

from fliqs_jax.errors import ConfigError
from fliqs_jax.exporting import speed
from fliqs_jax.reporting import page, terminal
from fliqs_jax.runs import timing
from fliqs_jax.runs.exports import read_speed

MODELS = ('found', 'float32', 'bf16', 'int4')


@pytest.fixture(scope='module')
def measured(deployed):
  """Times of the run's network and of uniform models; int4 as if it were searched."""
  result = {**deployed.result, 'uniform_costs': {'int4': 1.0}}
  given = deployed._replace(result=result)
  return speed.measure(given, ('stablehlo', 'onnx'), (1, 3), repeats=2)


def test_every_model_is_timed_with_every_batch_size(measured):
  rows = [(r['batch_size'], r['model'], r['target']) for r in measured['rows']]
  assert rows == [
    (size, model, target)
    for size in (1, 3)
    for model in MODELS
    for target in ('stablehlo', 'onnx')
  ]
  times = {row: r['ms'] for row, r in zip(rows, measured['rows'])}
  for (size, _, target), row in zip(rows, measured['rows']):
    assert row['ms'] > 0
    floats = times[size, 'float32', target]
    assert row['of_float32'] == pytest.approx(row['ms'] / floats)


def test_layers_multiply_in_the_arithmetic_of_their_formats(measured):
  kinds = {r['model']: r['arithmetic'] for r in measured['rows'][:8:2]}
  assert kinds == {
    'found': {'integer': 3}, 'float32': {'float32': 3}, 'bf16': {'bfloat16': 3},
    'int4': {'integer': 3},
  }  # fmt: skip


def test_medians_leave_the_first_call_out(monkeypatch):
  clock = iter([0, 0, 1, 0, 5, 0, 2])  # a start; starts and ends
  watch = types.SimpleNamespace(perf_counter=lambda: float(next(clock)))
  monkeypatch.setattr(timing, 'time', watch)
  assert timing.medians([lambda: 0], repeats=3) == [2.0]


def test_times_are_in_the_report_and_on_the_terminal(
  finished, measured, exported, tmp_path, capsys
):
  folder = tmp_path / 'run'
  shutil.copytree(finished, folder)
  shutil.copytree(exported('safetensors')[0], folder / 'export/safetensors')
  (folder / 'speed.json').write_text(json.dumps(measured))
  text = page.write_report([str(folder)]).read_text()
  assert '<h3>Taken away</h3>' in text and '<th scope="row">safetensors</th>' in text
  rows = re.findall(r'<th scope="row">(\w+)</th><td>(?:stablehlo|onnx)</td>', text)
  assert rows == [row['model'] for row in measured['rows']]
  terminal.print_speed(measured, str(folder))
  printed = capsys.readouterr().out
  assert '3 integer' in printed and f'Files: {folder}' in printed
  (folder / 'speed.json').write_text('{"rows": []}')
  with pytest.raises(ConfigError, match="speed.json' is damaged.*'device'"):
    read_speed(epath.Path(folder))


def test_a_run_is_measured_where_it_is(finished, tmp_path):
  folder = epath.Path(tmp_path / 'run')
  shutil.copytree(finished, folder)
  found = speed.measure_run(folder, ('stablehlo',), (2,), repeats=1)
  assert read_speed(folder) == found
  with pytest.raises(ConfigError, match="no speed of target 'qwix': expected one of"):
    speed.measure_run(folder, ('qwix',), (2,), repeats=1)
  (folder / 'search_result.json').unlink()
  with pytest.raises(ConfigError, match='unfinished run'):
    speed.measure_run(folder, ('stablehlo',), (2,), repeats=1)
