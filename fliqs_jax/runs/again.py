"""The config of a run that there is, to do it again; `--config` takes its folder.

python -m fliqs_jax.main --config=runs/digits --workdir=runs/again
"""

import ml_collections

from fliqs_jax.runs import files
from fliqs_jax.runs.config import complete
from fliqs_jax.runs.validation import OWN_BATCHES
from fliqs_jax.runs.workdir import kept_inputs, read_config


def get_config(workdir: str = '') -> ml_collections.ConfigDict:
  """Returns the config of the run in a folder.

  Files that it names are those that the run has kept, where they are not as they were.

  Raises:
    ValueError: where there is none, or a program in Python made it.
  """
  if not workdir:
    raise ValueError('expected the folder of a run, as configs/again.py:runs/digits')
  folder = files.to_path(workdir)
  found = read_config(folder)
  if found.dataset == OWN_BATCHES:
    raise ValueError(
      f'{workdir!r} was made by fliqs_jax.{found.mode}, whose network and data it does '
      'not hold: expected a run of fliqs_jax.main; make the same call in Python again'
    )
  config = complete(found)
  config.update_from_flattened_dict(kept_inputs(config, folder))
  return config
