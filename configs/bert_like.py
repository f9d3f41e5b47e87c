"""Encoders like BERT on lm1b, for TPUs; `:tiny`, on Python's library on a CPU.

    python -m fliqs_jax.main --config=configs/bert_like.py --workdir=gs://…
    python -m fliqs_jax.main --config=configs/bert_like.py:tiny --workdir=DIR

They predict bytes that are hidden from them. `:base` has the blocks of BERT base; it
has not been run.
"""

import ml_collections

from fliqs_jax.runs import recipes
from fliqs_jax.runs.config import default_config

VARIANTS = ('base', 'tiny')


def get_config(variant: str = 'base') -> ml_collections.ConfigDict:
  """Returns the config of a variant, one of `VARIANTS`."""
  if variant not in VARIANTS:
    raise ValueError(
      f'unknown variant {variant!r}: expected one of {", ".join(VARIANTS)}'
    )
  config = default_config()
  if variant == 'tiny':
    recipes.stdlib_text(config)
    sizes = {'hidden_size': 48, 'depth': 2, 'num_heads': 4, 'mlp_size': 192}
    config.model = {'name': 'encoder', 'width': 1.0, **sizes, 'max_tokens': 64}
  else:
    recipes.lm1b(config, batch_size=256, num_samples=4, learning_rate=1e-4)
    sizes = {'hidden_size': 768, 'depth': 12, 'num_heads': 12, 'mlp_size': 3072}
    config.model = {'name': 'encoder', 'width': 1.0, **sizes}
  return config
