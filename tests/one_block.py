"""`configs/resnet18.py` with one of its blocks, because compiling takes the time."""

import functools
import pathlib
import runpy

from fliqs_jax import models
from fliqs_jax.models import resnet

CONFIG = pathlib.Path(__file__).parents[1] / 'configs/resnet18.py'


def shrink():
  """Leaves the ResNet-18 of this process one block."""
  models.MODELS['resnet18'] = functools.partial(resnet.ResNet18, stage_sizes=(1,))


def get_config(variant='imagenet'):
  """Returns the config of a variant, as `configs/resnet18.py` does."""
  shrink()
  return runpy.run_path(CONFIG)['get_config'](variant)
