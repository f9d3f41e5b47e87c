"""Decoders like Llama and Gemma on lm1b, for a TPU v5e-64; `:tiny`, on a CPU.

    python -m fliqs_jax.main --config=configs/gemma_like.py:1b --workdir=gs://…
    python -m fliqs_jax.main --config=configs/gemma_like.py:tiny --workdir=DIR

`:1b` has the blocks of Llama 3.2 1B and `:7b` those of Gemma 7B, both on bytes, with
parameters split over all 64 chips. They have not been run. Sentences of lm1b are packed
into full windows in training, and padded in evaluation.
"""

import ml_collections

from fliqs_jax.models import decoder
from fliqs_jax.runs import recipes
from fliqs_jax.runs.config import default_config

VARIANTS = ('1b', '7b', 'tiny')


def get_config(variant: str = '1b') -> ml_collections.ConfigDict:
  """Returns the config of a variant, one of `VARIANTS`."""
  if variant not in VARIANTS:
    raise ValueError(
      f'unknown variant {variant!r}: expected one of {", ".join(VARIANTS)}'
    )
  config = default_config()
  if variant == 'tiny':
    _tiny(config)
  else:
    _lm1b(config, decoder.LLAMA_3_2_1B if variant == '1b' else decoder.GEMMA_7B)
  return config


def _lm1b(config, sizes):
  """A published network's blocks, its parameters split over 64 chips."""
  recipes.lm1b(
    config, batch_size=1_024, num_samples=4, learning_rate=3e-4, square_decay=0.95
  )
  sizes = {name: size for name, size in sizes.items() if name != 'vocabulary_size'}
  config.model = {'name': 'decoder', 'width': 1.0, **sizes, 'remat': True}
  config.fsdp = 64


def _tiny(config):
  """Two blocks of width 48, on a CPU."""
  recipes.stdlib_text(config)
  config.model = {
    'name': 'decoder', 'width': 1.0, 'hidden_size': 48, 'depth': 2, 'num_heads': 4,
    'num_kv_heads': 2, 'head_size': 12, 'mlp_size': 128, 'activation': 'gelu',
    'scales_embedding': True,
  }  # fmt: skip
