"""ResNet-18 on ImageNet, for TPUs; `:digits`, a narrow one on scikit-learn's digits.

python -m fliqs_jax.main --config=configs/resnet18.py --workdir=gs://…
python -m fliqs_jax.main --config=configs/resnet18.py:digits --workdir=runs/digits
"""

import ml_collections

from fliqs_jax.runs import recipes


def get_config(variant: str = 'imagenet') -> ml_collections.ConfigDict:
  """Returns the config of a variant, `imagenet` or `digits`."""
  config = recipes.start(
    variant, name='resnet18', width=1.0, small_images=False, project_first_block=False
  )
  if variant == 'imagenet':
    recipes.imagenet(config)
  else:
    recipes.digits(config, num_steps=1_500, width=0.125, small_images=True)
  return config
