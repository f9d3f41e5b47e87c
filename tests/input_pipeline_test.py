"""Batches from the digits and from a dataset of JPEG files that the test makes."""

import io

import jax
import numpy as np
from PIL import Image
import pytest
from sklearn import datasets as sklearn_datasets
import tensorflow_datasets as tfds

from fliqs_jax import input_pipeline


@pytest.fixture
def config(tiny_config):
  return tiny_config.copy_and_resolve_references()


@pytest.fixture
def builder(config):
  return input_pipeline.find_builder(config)


def pixels_of(batch, settings):
  """Undoes the normalization: the images in 0 … 255."""
  return (batch['image'] * settings.stddev + settings.mean) * 255


def test_evaluation_sees_every_example_once(config, builder):
  batches = list(input_pipeline.eval_batches(config, builder))
  assert [batch['mask'].sum() for batch in batches] == [128, 128, 104]
  assert {batch['image'].shape for batch in batches} == {(128, 8, 8, 1)}
  images = np.concatenate([pixels_of(b, config.input)[b['mask']] for b in batches])
  labels = np.concatenate([b['label'][b['mask']] for b in batches])
  digits = sklearn_datasets.load_digits()
  expected = sorted(
    (label, *np.round(image.ravel() * 255 / 16))
    for image, label in zip(digits.images[::5], digits.target[::5])
  )
  found = sorted(
    (label, *np.round(image.ravel())) for image, label in zip(images, labels)
  )
  np.testing.assert_array_equal(found, expected)


def test_training_batches_are_a_function_of_seed_and_step(config, builder):
  def take(seed, count):
    batches = input_pipeline.train_batches(config, builder, seed)
    return [next(batches) for _ in range(count)]

  first, again, other = take(0, 4), take(0, 4), take(1, 4)
  assert first[0]['image'].shape == (2, 16, 8, 8, 1)
  assert first[0]['label'].shape == (2, 16) and first[0]['label'].dtype == np.int32
  jax.tree.map(np.testing.assert_array_equal, first, again)
  assert any((a['label'] != b['label']).any() for a, b in zip(first, other))


def test_iterator_goes_on_from_its_state(config, builder):
  batches = input_pipeline.train_batches(config, builder, 0)
  for _ in range(3):
    next(batches)
  state = batches.get_state()
  expected = next(batches)
  restored = input_pipeline.train_batches(config, builder, 0)
  restored.set_state(state)
  jax.tree.map(np.testing.assert_array_equal, next(restored), expected)


def test_an_epoch_holds_every_training_example_once(config, builder):
  config.batch_size = 1437 // 3  # a divisor of the examples there are
  config.search.num_samples = 1
  batches = input_pipeline.train_batches(config, builder, 0)
  epoch = np.concatenate([next(batches)['image'][0] for _ in range(3)])
  images = sklearn_datasets.load_digits().images
  expected = np.delete(images, np.s_[::5], axis=0).reshape(1437, -1)
  found = np.round((epoch.reshape(1437, -1) * 0.5 + 0.5) * 16)
  # Sorted as rows: the same multiset of images.
  np.testing.assert_array_equal(
    found[np.lexsort(found.T)], expected[np.lexsort(expected.T)]
  )


def test_held_out_examples_come_from_their_own_split(config, builder):
  config.reward.split = 'validation'
  config.input.train_split, config.input.reward_split = 'train[:50]', 'train[50:100]'
  batches = input_pipeline.train_batches(config, builder, 0)
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
    input_pipeline.find_builder(config)
  assert '\n' not in str(error.value)


def test_unknown_split(config, builder):
  config.input.eval_split = 'nonsense'
  with pytest.raises(ValueError, match="split 'nonsense'"):
    input_pipeline.prepare(config, builder)


class Photographs(tfds.core.GeneratorBasedBuilder):
  """JPEG files of several sizes, each in one grey that is its label."""

  VERSION = tfds.core.Version('1.0.0')

  def _info(self):
    return tfds.core.DatasetInfo(
      builder=self,
      features=tfds.features.FeaturesDict(
        {
          'image': tfds.features.Image(encoding_format='jpeg'),
          'label': tfds.features.ClassLabel(num_classes=200),
        }
      ),
    )

  def _split_generators(self, dl_manager):
    return {'train': self._generate_examples(24), 'test': self._generate_examples(9)}

  def _generate_examples(self, count):
    rng = np.random.default_rng(count)
    for index in range(count):
      grey, (height, width) = rng.integers(200), rng.integers(40, 120, size=2)
      file = io.BytesIO()
      Image.new('RGB', (int(width), int(height)), (int(grey),) * 3).save(file, 'JPEG')
      yield index, {'image': io.BytesIO(file.getvalue()), 'label': int(grey)}


def test_jpeg_files_are_cropped_and_resized(config, tmp_path):
  config.dataset, config.num_classes = 'photographs', 200
  config.batch_size, config.eval_batch_size = 8, 4
  config.input.update(
      data_dir=str(tmp_path), image_shape=(24, 32, 3), augmentation='crop_flip',
      mean=(0.4, 0.5, 0.6), stddev=(0.2, 0.3, 0.4),
  )  # fmt: skip
  tfds.builder(
    'photographs', data_dir=tmp_path, file_format='array_record'
  ).download_and_prepare()
  builder = input_pipeline.find_builder(config)
  input_pipeline.prepare(config, builder)
  train = next(input_pipeline.train_batches(config, builder, 0))
  train = {key: value.reshape(8, *value.shape[2:]) for key, value in train.items()}
  for batch in (train, *input_pipeline.eval_batches(config, builder)):
    assert batch['image'].shape[1:] == (24, 32, 3)
    expected = np.broadcast_to(
      batch['label'][:, None, None, None], batch['image'].shape
    )
    # A grey survives JPEG, cropping and resizing to within a level.
    np.testing.assert_allclose(pixels_of(batch, config.input), expected, atol=1.5)
