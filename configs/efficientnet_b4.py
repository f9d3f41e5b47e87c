"""EfficientNet-B4 on ImageNet, for TPUs; `:digits`, a narrow one on the digits.

python -m fliqs_jax.main --config=configs/efficientnet_b4.py --workdir=gs://…
python -m fliqs_jax.main --config=configs/efficientnet_b4.py:digits --workdir=DIR
"""

import ml_collections

from fliqs_jax.runs import recipes


def get_config(variant: str = 'imagenet') -> ml_collections.ConfigDict:
  """Returns the config of a variant, `imagenet` or `digits`."""
  return recipes.efficientnet(variant, 'efficientnet_b4', image_size=380, deep=True)
