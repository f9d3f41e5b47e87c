"""Batches from the digits and from a dataset of JPEG files that the test makes."""

import importlib
import io

from conftest import ROOT, load_config
import jax
import numpy as np
from PIL import Image
import pytest
from references import area_means
from sklearn import datasets as sklearn_datasets
import tensorflow as tf
import tensorflow_datasets as tfds

from fliqs_jax.data import pipeline
from fliqs_jax.errors import ConfigError
from fliqs_jax.runs import loop


@pytest.fixture
def config(tiny_config):
  return tiny_config.copy_and_resolve_references()


@pytest.fixture
def builder(config):
  return pipeline.find_builder(config)


def test_evaluation_sees_every_example_once(config, builder):
  batches = list(pipeline.eval_batches(config, builder))
  assert [batch['mask'].sum() for batch in batches] == [128, 128, 104]
  assert {batch['image'].shape for batch in batches} == {(128, 8, 8, 1)}
  images = np.concatenate([b['image'][b['mask']] for b in batches])
  labels = np.concatenate([b['label'][b['mask']] for b in batches])
  digits = sklearn_datasets.load_digits()
  expected = sorted(
    (label, *np.round(image.ravel() * 255 / 16))
    for image, label in zip(digits.images[::5], digits.target[::5])
  )
  found = sorted((label, *image.ravel()) for image, label in zip(images, labels))
  np.testing.assert_array_equal(found, expected)


def test_training_batches_are_a_function_of_seed_and_step(config, builder):
  def take(seed, count):
    batches = pipeline.train_batches(config, builder, seed)
    return [next(batches) for _ in range(count)]

  first, again, other = take(0, 4), take(0, 4), take(1, 4)
  assert first[0]['image'].shape == (2, 16, 8, 8, 1)
  assert first[0]['label'].shape == (2, 16) and first[0]['label'].dtype == np.int32
  jax.tree.map(np.testing.assert_array_equal, first, again)
  assert any((a['label'] != b['label']).any() for a, b in zip(first, other))


def test_iterator_goes_on_from_its_state(config, builder):
  batches = pipeline.train_batches(config, builder, 0)
  for _ in range(3):
    next(batches)
  state = batches.get_state()
  expected = next(batches)
  restored = pipeline.train_batches(config, builder, 0)
  restored.set_state(state)
  jax.tree.map(np.testing.assert_array_equal, next(restored), expected)


def test_an_epoch_holds_every_training_example_once(config, builder):
  config.batch_size = 1437 // 3  # a divisor of the examples there are
  config.search.num_samples = 1
  batches = pipeline.train_batches(config, builder, 0)
  epoch = np.concatenate([next(batches)['image'][0] for _ in range(3)])
  images = sklearn_datasets.load_digits().images
  expected = np.delete(images, np.s_[::5], axis=0).reshape(1437, -1)
  found = np.round(epoch.reshape(1437, -1) / 255 * 16)
  # Sorted as rows: the same multiset of images.
  np.testing.assert_array_equal(
    found[np.lexsort(found.T)], expected[np.lexsort(expected.T)]
  )


def test_held_out_examples_come_from_their_own_split(config, builder):
  config.reward.split = 'validation'
  config.input.train_split, config.input.reward_split = 'train[:50]', 'train[50:100]'
  batches = pipeline.train_batches(config, builder, 0)
  trained, held_out = set(), set()
  for _ in range(8):
    batch = next(batches)
    trained |= {image.tobytes() for image in batch['image'].reshape(-1, 64)}
    held_out |= {image.tobytes() for image in batch['reward']['image'].reshape(-1, 64)}
  assert len(trained) == len(held_out) == 50
  assert not trained & held_out


@pytest.mark.parametrize(
  'changes, expected',
  [
    ({'dataset': 'digit'}, "the nearest is 'digits'"),
    ({'num_classes': 11}, 'expected 10'),
    ({'dataset': 'mnist'}, 'tfds build mnist --file_format=array_record'),
  ],
)
def test_unusable_dataset(config, changes, expected):
  config.update_from_flattened_dict(changes)
  with pytest.raises(ValueError, match=expected) as error:
    pipeline.find_builder(config)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('field', ['train_split', 'eval_split'])
@pytest.mark.parametrize('split', ['nonsense', ''])
def test_unknown_split(config, builder, field, split):
  config.input[field] = split
  with pytest.raises(ConfigError, match=f"split '{split}'"):
    pipeline.prepare(config, builder)


@pytest.fixture(scope='module')
def photographs(tiny_config, tmp_path_factory):
  """The config of a search on JPEG files of ImageNet's sizes, and their builder."""
  with pytest.MonkeyPatch.context() as monkeypatch:
    monkeypatch.syspath_prepend(ROOT / 'benchmarks')
    importlib.import_module('photographs')
  config = tiny_config.copy_and_resolve_references()
  config.dataset, config.num_classes = 'photographs/small', 10
  config.num_steps, config.batch_size, config.eval_batch_size = 2, 8, 16
  config.input.update(
      data_dir=str(tmp_path_factory.mktemp('photographs')), image_shape=(48, 64, 3),
      augmentation='rand_augment', erasing=0.25, mixup_alpha=0.8, cutmix_alpha=1.0,
      mean=(0.485, 0.456, 0.406), stddev=(0.229, 0.224, 0.225),
  )  # fmt: skip
  builder = tfds.builder(
    config.dataset, data_dir=config.input.data_dir, file_format='array_record'
  )
  builder.download_and_prepare()
  builder = pipeline.find_builder(config)
  pipeline.prepare(config, builder)
  return config, builder


def files_of(builder, split):
  return [
    (example['image'], example['label'])
    for example in builder.as_data_source(
      split, decoders={'image': tfds.decode.SkipDecoding()}
    )
  ]


def test_photographs_have_the_sizes_of_imagenet(photographs):
  images = [
    Image.open(io.BytesIO(file)) for file, _ in files_of(photographs[1], 'train')
  ]
  width, height = np.mean([image.size for image in images], axis=0)
  assert 370 < width < 430 and 320 < height < 380
  assert max(max(image.size) for image in images) > 800
  assert {image.mode for image in images} == {'RGB', 'L', 'CMYK'}


def test_evaluation_of_jpeg_files_is_that_of_pil(photographs):
  config, builder = photographs
  batches = list(pipeline.eval_batches(config, builder))
  assert [batch['mask'].sum() for batch in batches] == [16, 9]
  images = np.concatenate([batch['image'][batch['mask']] for batch in batches])
  labels = np.concatenate([batch['label'][batch['mask']] for batch in batches])
  assert images.dtype == np.uint8 and images.shape == (25, 48, 64, 3)
  for image, label, (file, expected_label) in zip(
    images, labels, files_of(builder, 'test')
  ):
    assert label == expected_label
    pil = Image.open(io.BytesIO(file))
    bound = 2 if pil.mode == 'CMYK' else 1  # rounding
    pil = pil.convert('RGB')
    scale = 0.875 * min(pil.width / 64, pil.height / 48)
    w, h = round(64 * scale), round(48 * scale)
    left, top = (pil.width - w) // 2, (pil.height - h) // 2
    cut = pil.crop((left, top, left + w, top + h))
    if w > 2 * 64 and h > 2 * 48:
      expected = area_means(np.asarray(cut), (64, 48))
    else:
      box = (0, 0, w, h)
      how = Image.Transform.EXTENT, box, Image.Resampling.BILINEAR
      expected = np.asarray(cut.transform((64, 48), *how), np.float32)
    assert np.abs(image - np.round(expected)).max() <= bound


def test_augmentation_is_a_function_of_seed_and_step_and_place(photographs):
  config, builder = photographs
  take = lambda seed, **options: [
    next(batches)
    for batches in [pipeline.train_batches(config, builder, seed, **options)]
    for _ in range(2)
  ]
  whole, again, other = take(0), take(0), take(1)
  assert whole[0]['image'].shape == (2, 4, 48, 64, 3)
  assert whole[0]['image'].dtype == np.uint8
  jax.tree.map(np.testing.assert_array_equal, whole, again)
  assert not np.array_equal(whole[0]['image'], other[0]['image'])

  class SecondProcess:
    """The sharding of two processes, the second of which holds the ends of samples."""

    def addressable_devices_indices_map(self, shape):
      return {'device': (slice(None), slice(shape[1] // 2, None))}

  part = take(0, sharding=SecondProcess())
  for a, b in zip(whole, part):
    np.testing.assert_array_equal(a['image'][:, 2:], b['image'])
    np.testing.assert_array_equal(a['label'][:, 2:], b['label'])


def test_held_out_photographs_are_not_augmented(photographs):
  config, builder = photographs
  config = config.copy_and_resolve_references()
  config.reward.split, config.input.reward_split = 'validation', 'test'
  batch = next(pipeline.train_batches(config, builder, 0))['reward']
  evaluated = np.concatenate(
    [batch['image'] for batch in pipeline.eval_batches(config, builder)]
  )
  for image in batch['image'].reshape(-1, 48, 64, 3):
    assert (image == evaluated).all(axis=(1, 2, 3)).any()


def test_file_that_is_no_image(photographs, monkeypatch):
  config, builder = photographs
  example = tf.train.Example()
  example.features.feature['image'].bytes_list.value.append(b'no image')
  example.features.feature['label'].int64_list.value.append(0)
  examples = [example] * 16
  monkeypatch.setattr(builder, 'as_data_source', lambda *args, **kwargs: examples)
  for batches in (
    pipeline.train_batches(config, builder, 0),
    pipeline.eval_batches(config, builder),
  ):
    with pytest.raises(ValueError, match='example [0-9]+ .*a JPEG or a PNG file'):
      next(batches)


def test_search_on_photographs(photographs, tmp_path):
  config, _ = photographs
  config = config.copy_and_resolve_references()
  config.search.statistics_batches = 1
  result = loop.run(config, tmp_path / 'run')
  assert result['eval']['num_examples'] == 25
  assert np.isfinite(result['eval']['loss'])


@pytest.mark.parametrize('folder', ['/dev/null/data', '/proc/data'])
def test_a_folder_that_cannot_hold_a_dataset_is_one_line(folder):
  config = load_config('resnet18', 'digits')
  config.input.data_dir = folder
  with pytest.raises(ConfigError, match="'digits' cannot be kept in") as error:
    pipeline.prepare(config, pipeline.find_builder(config))
  assert len(error.value.problems) == 1
