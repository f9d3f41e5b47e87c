"""`configs/resnet18.py` with one of its blocks, because compiling takes the time."""

import functools
import pathlib
import runpy

from fliqs_jax import models
from fliqs_jax.models import resnet

CONFIG = pathlib.Path(__file__).parents[1] / 'configs/resnet18.py'
STAGE_SIZES = (1,)


def shrink():
  """Leaves the ResNet-18 of this process one block, whatever its config says."""
  models.MODELS['resnet18'] = functools.partial(
    resnet.ResNet18, stage_sizes=STAGE_SIZES
  )


def get_config(variant='imagenet'):
  """Returns the config of a variant, as `configs/resnet18.py` does."""
  config = runpy.run_path(CONFIG)['get_config'](variant)
  # In the config, so that commands that read a run have the same network.
  config.model.stage_sizes = STAGE_SIZES
  config.search.statistics_batches = 1
  return config
