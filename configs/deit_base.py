"""DeiT-base on ImageNet, for TPUs; `:digits`, a narrow one on scikit-learn's digits.

python -m fliqs_jax.main --config=configs/deit_base.py --workdir=gs://…
python -m fliqs_jax.main --config=configs/deit_base.py:digits --workdir=DIR
"""

import ml_collections

from fliqs_jax.runs import recipes


def get_config(variant: str = 'imagenet') -> ml_collections.ConfigDict:
  """Returns the config of a variant, `imagenet` or `digits`."""
  return recipes.deit(variant, 'deit_base', width_on_digits=0.0625)
