"""The dataset of Python's own library, and batches of its bytes."""

import importlib
import random
import sysconfig

import jax
import numpy as np
import pytest

from fliqs_jax.data import pipeline
from fliqs_jax.data.datasets import stdlib_text
from fliqs_jax.data.examples import TEXTS
from fliqs_jax.errors import ConfigError


@pytest.fixture
def config(text_config):
  return text_config.copy_and_resolve_references()


@pytest.fixture
def builder(config):
  return pipeline.find_builder(config)


@pytest.fixture(scope='module')
def texts():
  """The bytes of each split, read from the files."""
  return {
    split: b''.join(path.read_bytes() for path in paths)
    for split, paths in stdlib_text.split_files().items()
  }


class SecondProcess:
  """The sharding of two processes, the second of which holds the ends of samples."""

  def addressable_devices_indices_map(self, shape):
    return {'device': (slice(None), slice(shape[1] // 2, None))}


def test_splits_share_no_file_and_leave_out_what_is_installed():
  splits = stdlib_text.split_files()
  assert splits == stdlib_text.split_files()
  assert not set(splits['train']) & set(splits['test'])
  names = {path.name for paths in splits.values() for path in paths}
  assert {'argparse.py', 'textwrap.py', 'ast.py'} <= names
  root = sysconfig.get_path('stdlib')
  for path in (*splits['train'], *splits['test']):
    folders = path.relative_to(root).parts[:-1]
    assert not {'site-packages', 'test', 'tests'} & set(folders)
  share = len(splits['test']) / (len(splits['train']) + len(splits['test']))
  assert 0.05 < share < 0.15


def test_examples_are_the_files_bytes(builder, texts):
  for split in ('train', 'test'):
    examples = [example['text'].tobytes() for example in builder.as_data_source(split)]
    assert {len(example) for example in examples} == {stdlib_text.CHUNK}
    if split == 'train':
      assert len(examples) == len(texts[split]) // stdlib_text.CHUNK
    else:
      assert len(set(examples)) > 0.99 * len(examples)
      assert len(examples) == 4_096
    assert all(example in texts[split] for example in examples[::97])


def test_version_is_that_of_python(builder):
  assert sysconfig.get_python_version() == '.'.join(str(builder.version).split('.')[:2])


def test_no_library(monkeypatch, tmp_path, config):
  monkeypatch.setattr(stdlib_text.sysconfig, 'get_path', lambda name: str(tmp_path))
  config.input.data_dir = str(tmp_path / 'tfds')
  with pytest.raises(ConfigError, match='no standard library'):
    pipeline.prepare(config, pipeline.find_builder(config))


def test_evaluation_has_4096_fixed_windows(config, builder, texts):
  batches = list(pipeline.eval_batches(config, builder))
  windows = np.concatenate([batch['tokens'][batch['mask']] for batch in batches])
  assert windows.shape == (4_096, config.input.context + 1)
  assert windows.dtype == np.uint8
  assert all(window.tobytes() in texts['test'] for window in windows[::97])
  again = np.concatenate(
    [batch['tokens'] for batch in pipeline.eval_batches(config, builder)]
  )
  np.testing.assert_array_equal(again, windows)


def test_training_windows_are_a_function_of_seed_and_step(config, builder, texts):
  def take(seed, sharding=None):
    batches = pipeline.train_batches(config, builder, seed, sharding)
    return [next(batches)['tokens'] for _ in range(3)]

  whole, other, part = take(0), take(1), take(0, SecondProcess())
  assert whole[0].shape == (2, 4, config.input.context + 1)
  np.testing.assert_array_equal(whole, take(0))
  assert not np.array_equal(whole, other)
  np.testing.assert_array_equal([batch[:, 2:] for batch in whole], part)
  windows = np.concatenate(whole).reshape(-1, config.input.context + 1)
  assert all(window.tobytes() in texts['train'] for window in windows)


def test_windows_begin_anywhere_in_an_example(config, builder):
  config.input.train_split = 'train[:1]'
  (text,) = (example['text'] for example in builder.as_data_source('train[:1]'))
  batches = pipeline.train_batches(config, builder, 0)
  size = config.input.context + 1
  starts = {
    text.tobytes().index(window.tobytes())
    for _ in range(40)
    for window in next(batches)['tokens'].reshape(-1, size)
  }
  assert min(starts) < 50 and max(starts) > stdlib_text.CHUNK - size - 50


def test_iterator_goes_on_from_its_state(config, builder):
  batches = pipeline.train_batches(config, builder, 0)
  next(batches)
  state = batches.get_state()
  expected = next(batches)
  restored = pipeline.train_batches(config, builder, 0)
  restored.set_state(state)
  jax.tree.map(np.testing.assert_array_equal, next(restored), expected)


@pytest.mark.parametrize('given', [b'abc', np.frombuffer(b'abc', np.uint8)])
def test_short_texts_are_padded(config, given):
  config.input.context = 4
  arrays = TEXTS.empty(config.input, 1)
  TEXTS.evaluation(config.input, {'text': given}, {'tokens': arrays['tokens'][0]})
  assert arrays['tokens'].tolist() == [[97, 98, 99, 0, 0]]


@pytest.mark.parametrize('as_array', [False, True])
def test_packed_windows_are_full(config, as_array):
  config.input.update(context=6, packed=True)
  others = iter([b'', b'de', b'fgh', b'never'])

  def example(text):
    return {'text': np.frombuffer(text, np.uint8) if as_array else text}

  arrays = TEXTS.empty(config.input, 1)
  out = {'tokens': arrays['tokens'][0]}
  another = lambda: example(next(others))
  TEXTS.train(config.input, example(b'abc'), random.Random(0), another, out)
  assert bytes(out['tokens']) == b'abc\0\0de'
  # A text that fills a window by itself is cut anywhere, and followed by none.
  cuts = set()
  for seed in range(20):
    TEXTS.train(config.input, example(b'12345678'), random.Random(seed), another, out)
    cuts.add(bytes(out['tokens']))
  assert cuts == {b'1234567', b'2345678'} and next(others) == b'fgh'


def test_batches_of_packed_windows_are_a_function_of_the_step(config, builder):
  texts = [t['text'].tobytes()[:9] for t in builder.as_data_source('train[:64]')]

  class Short:
    """A builder whose texts are shorter than a window."""

    def as_data_source(self, split, decoders=None):
      return [{'text': text} for text in texts]

  config.input.packed = True
  first, again = (
    next(pipeline.train_batches(config, Short(), 0))['tokens'] for _ in range(2)
  )
  np.testing.assert_array_equal(first, again)
  for window in first.reshape(-1, first.shape[-1]):
    *whole, last = window.tobytes().split(b'\0')
    assert set(whole) <= set(texts) and any(t.startswith(last) for t in texts)


@pytest.mark.parametrize(
  'changes, expected',
  [
    ({'input.context': 1_024}, 'input.context=1024: expected 1023 or less'),
    ({'num_classes': 10}, 'expected 256'),
    ({'dataset': 'digits', 'num_classes': 10}, "no feature 'text'"),
    ({'input.context': None}, "no feature 'image'"),
  ],
)
def test_dataset_that_does_not_fit(config, changes, expected):
  importlib.import_module(pipeline.PACKAGED['digits'])
  config.update_from_flattened_dict(changes)
  with pytest.raises(ConfigError, match=expected) as error:
    pipeline.find_builder(config)
  assert '\n' not in str(error.value)
