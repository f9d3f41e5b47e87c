"""scikit-learn's handwritten digits as a TFDS dataset: real data without a download."""

import numpy as np
from sklearn import datasets as sklearn_datasets
import tensorflow_datasets as tfds

_TEST_EVERY = 5


class Digits(tfds.core.GeneratorBasedBuilder):
  """1,797 handwritten digits of 8×8 pixels; every fifth is a test example.

  A copy of the test set of the UCI ML hand-written digits dataset, as scikit-learn
  distributes it. Its 17 grey levels are stretched to 0 … 255.
  """

  VERSION = tfds.core.Version('1.0.0')
  RELEASE_NOTES = {'1.0.0': 'Initial release.'}

  def _info(self) -> tfds.core.DatasetInfo:
    return self.dataset_info_from_configs(
      description=self.__doc__,
      homepage='https://archive.ics.uci.edu/dataset/80',
      features=tfds.features.FeaturesDict(
        {
          'image': tfds.features.Image(shape=(8, 8, 1), dtype=np.uint8),
          'label': tfds.features.ClassLabel(num_classes=10),
        }
      ),
      supervised_keys=('image', 'label'),
    )

  def _split_generators(self, dl_manager):
    del dl_manager
    digits = sklearn_datasets.load_digits()
    images = np.round(digits.images[..., None] * (255 / 16)).astype(np.uint8)
    examples = list(enumerate(zip(images, digits.target)))
    return {
      'train': self._generate_examples(e for e in examples if e[0] % _TEST_EVERY),
      'test': self._generate_examples(e for e in examples if not e[0] % _TEST_EVERY),
    }

  def _generate_examples(self, examples):
    for index, (image, label) in examples:
      yield index, {'image': image, 'label': int(label)}
