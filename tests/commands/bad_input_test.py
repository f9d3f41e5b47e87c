"""Random edits of a config and of the files that a run reads: no traceback, ever."""

import json

from etils import epath
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
import jax
import ml_collections
import pytest
from whole_runs import Smallest

from fliqs_jax import models
from fliqs_jax.errors import ConfigError
from fliqs_jax.runs import files, loop

FORMATS = {
  layer: {'weights': 'int4', 'activations': 'int4'}
  for layer in ('conv', 'hidden', 'classifier')
}
PATHS = ('formats', 'checkpoint', 'input.data_dir', 'search.latency_table')

numbers = st.sampled_from([-1, 0, 1, 2, 3, 5, 8, 10, 11, 60, 64, 96, 1000])
floats = st.sampled_from(
  [float('nan'), float('inf'), -float('inf'), -1.0, 0.0, 1e-30, 0.5, 1.0, 2.0, 1e30]
)
names = st.sampled_from(
    ['', 'int4', 'bf16', 'int2,,int4', 'e4m3', 'nonsense', 'a\nb', '(', 'é', '/', '.',
     'train', 'eval', 'train[:10]', 'train[:0]', 'test[', 'adamw', 'smallest', 'digits',
     'mnist', 'model_size', 'latency_table', 'roofline', 'separate', 'weights',
     'moving', 'validation', 'minus_loss', 'soft_exponential', 'bfloat16', 'linear'],
)  # fmt: skip
entries = st.one_of(numbers, floats, names, st.tuples(names, names), st.none())
tuples = st.one_of(
  st.lists(entries, max_size=3).map(tuple),
  st.sampled_from(
    [(8, 8, 1), (8, 8, 3), (16, 9, 1), (1, 1, 1), ('.*',), ('conv', '.*')]
  ),
)


def fields_of(config, prefix=''):
  for name, value in config.items():
    if isinstance(value, ml_collections.ConfigDict):
      yield from fields_of(value, f'{prefix}{name}.')
    elif f'{prefix}{name}' not in PATHS:
      yield f'{prefix}{name}', value


def values_like(field, value):
  if isinstance(value, bool):
    return st.booleans()
  for kind, values in ((int, numbers), (float, floats), (str, names), (tuple, tuples)):
    if isinstance(value, kind):
      return values
  return st.one_of(numbers, floats, names)  # a placeholder knows its type


class Stopped(Exception):
  """The first step was traced."""


@pytest.fixture
def base(tiny_config, monkeypatch, tmp_path):
  """The config to edit; runs stop before their first step is compiled."""
  make_step = loop.make_step

  def make_traced(*args):
    step = make_step(*args)

    def traced(state, batch):
      jax.eval_shape(step, state, batch)
      raise Stopped

    return traced

  monkeypatch.setitem(models.MODELS, 'smallest', Smallest)
  monkeypatch.setattr(loop, 'make_step', make_traced)
  monkeypatch.chdir(tmp_path)
  config = tiny_config.copy_and_resolve_references()
  config.model.name = 'smallest'
  return config


@settings(
  max_examples=20,
  deadline=None,
  derandomize=True,
  suppress_health_check=list(HealthCheck),
)
@given(data=st.data())
def test_an_edited_config_runs_or_is_explained(base, tmp_path_factory, data):
  config = base.copy_and_resolve_references()
  fields = dict(fields_of(base))
  edits = {}
  for field in data.draw(st.lists(st.sampled_from(sorted(fields)), max_size=3)):
    value = data.draw(values_like(field, fields[field]))
    try:
      config.update_from_flattened_dict({field: value})
    except TypeError:  # which the command line reports by itself
      continue
    edits[field] = value
  workdir = epath.Path(tmp_path_factory.mktemp('edited') / 'run')
  try:
    loop.run(config, workdir)
  except Stopped:
    assert (workdir / 'config.json').exists()
  except ConfigError as error:
    assert error.problems and all(problem.strip() for problem in error.problems), edits
    assert not workdir.exists(), edits


json_values = st.recursive(
  st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
  lambda inner: (
    st.lists(inner, max_size=3)
    | st.dictionaries(st.text(max_size=5), inner, max_size=3)
  ),
  max_leaves=5,
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
  damage=st.one_of(
    st.binary(max_size=60).map(lambda content: lambda _: content),
    st.tuples(st.integers(0, 400), st.binary(min_size=1, max_size=4)).map(
      lambda edit: (
        lambda text: text[: edit[0]] + edit[1] + text[edit[0] + len(edit[1]) :]
      )
    ),
    st.integers(0, 400).map(lambda size: lambda text: text[:size]),
    json_values.map(lambda value: lambda _: json.dumps(value).encode()),
    st.tuples(st.sampled_from([*FORMATS, 'formats']), json_values).map(
      lambda edit: (
        lambda _: json.dumps({'formats': {**FORMATS, edit[0]: edit[1]}}).encode()
      )
    ),
    json_values.map(lambda value: lambda _: json.dumps({'formats': value}).encode()),
  )
)
def test_a_damaged_result_is_explained(tmp_path_factory, damage):
  path = tmp_path_factory.getbasetemp() / 'formats.json'
  path.write_bytes(damage(json.dumps({'formats': FORMATS}).encode()))
  try:
    assignment = files.read_formats(str(path))
  except ValueError as error:
    assert all(line.strip() for line in str(error).split('\n'))
  else:
    assert isinstance(assignment, dict)
    for assigned in assignment.values():
      assert sorted(assigned) == ['activations', 'weights']
