"""ResNet-50 on ImageNet, for TPUs; `:digits`, a narrow one on scikit-learn's digits.

python -m fliqs_jax.main --config=configs/resnet50.py --workdir=gs://…
python -m fliqs_jax.main --config=configs/resnet50.py:digits --workdir=DIR
"""

import ml_collections

from fliqs_jax.runs import recipes


def get_config(variant: str = 'imagenet') -> ml_collections.ConfigDict:
  """Returns the config of a variant, `imagenet` or `digits`."""
  config = recipes.start(variant, name='resnet50', width=1.0, small_images=False)
  if variant == 'imagenet':
    recipes.imagenet(config)
  else:
    recipes.digits(config, width=0.125, small_images=True)
  return config
