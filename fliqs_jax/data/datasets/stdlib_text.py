"""The running Python's standard library as text: real data without a download."""

import hashlib
import pathlib
import sys
import sysconfig

import numpy as np
import tensorflow_datasets as tfds

from fliqs_jax.errors import ConfigError

CHUNK = 1_024  # bytes of an example
NUM_TEST_EXAMPLES = 4_096

_TEST_SHARE = 0.1  # of the files, about
# Folders whose files depend on what is installed, or are tests.
_LEFT_OUT = {'site-packages', 'dist-packages', 'test', 'tests', 'idle_test'}


class StdlibText(tfds.core.GeneratorBasedBuilder):
  """Bytes of the source files of Python's standard library, 1,024 an example.

  A hash of a file's path decides whether its text is for training or for tests. The
  texts of either split follow each other in the order of their paths. Training examples
  do not overlap; the 4,096 test examples begin at equal distances. The text differs
  between versions of Python: the dataset has the version of the one that made it.
  """

  VERSION = tfds.core.Version('.'.join(map(str, sys.version_info[:3])))
  RELEASE_NOTES = {str(VERSION): 'The standard library of that Python.'}

  def _info(self) -> tfds.core.DatasetInfo:
    return self.dataset_info_from_configs(
      description=self.__doc__,
      homepage='https://docs.python.org/3/library/',
      features=tfds.features.FeaturesDict(
        {'text': tfds.features.Tensor(shape=(CHUNK,), dtype=np.uint8)}
      ),
    )

  def _split_generators(self, dl_manager):
    del dl_manager
    train, test = (_read(split_files()[split]) for split in ('train', 'test'))
    if min(len(train), len(test)) < CHUNK:
      raise ConfigError(
        f'no standard library in {sysconfig.get_path("stdlib")!r}: expected the source '
        'files that come with Python'
      )
    last = len(test) - CHUNK
    return {
      'train': self._generate_examples(train, range(0, len(train) - CHUNK + 1, CHUNK)),
      'test': self._generate_examples(
        test, [i * last // (NUM_TEST_EXAMPLES - 1) for i in range(NUM_TEST_EXAMPLES)]
      ),
    }

  def _generate_examples(self, text, starts):
    for index, start in enumerate(starts):
      yield index, {'text': text[start : start + CHUNK]}


def split_files() -> dict[str, list[pathlib.Path]]:
  """Returns the files of the splits `train` and `test`, sorted by path."""
  root = pathlib.Path(sysconfig.get_path('stdlib'))
  splits = {'train': [], 'test': []}
  for path in sorted(root.rglob('*.py')):
    relative = path.relative_to(root)
    # Of the build's own paths and compilers.
    generated = path.name.startswith('_sysconfigdata')
    if not generated and not _LEFT_OUT & set(relative.parts[:-1]):
      digest = hashlib.sha256(relative.as_posix().encode()).digest()
      splits['test' if digest[0] < 256 * _TEST_SHARE else 'train'].append(path)
  return splits


def _read(paths):
  return np.frombuffer(b''.join(path.read_bytes() for path in paths), np.uint8)
