"""The config of a run that there is, to do it again.

python -m fliqs_jax.main --config=configs/again.py:runs/digits --workdir=runs/again
"""

from etils import epath
import ml_collections

from fliqs_jax.runs.config import OWN_BATCHES, default_config
from fliqs_jax.runs.workdir import read_config


def get_config(workdir: str = '') -> ml_collections.ConfigDict:
  """Returns the config of the run in a folder.

  Raises:
    ValueError: where there is none, or `fliqs_jax.search` made it.
  """
  if not workdir:
    raise ValueError('expected the folder of a run, as configs/again.py:runs/digits')
  found = read_config(epath.Path(workdir))
  if found.dataset == OWN_BATCHES:
    raise ValueError(
      f'{workdir!r} was made by fliqs_jax.search, whose network and data it does not '
      'hold: expected a run of fliqs_jax.main; make the same call in Python again'
    )
  config = default_config()
  config.model = found.model
  config.update(found)
  return config
