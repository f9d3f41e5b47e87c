"""Decoders like Gemma; `:tiny` trains on Python's library, in bytes, on a CPU.

python -m fliqs_jax.main --config=configs/gemma_like.py:tiny --workdir=DIR
"""

import ml_collections

from fliqs_jax.runs.config import default_config

VARIANTS = ('tiny',)


def get_config(variant: str = 'tiny') -> ml_collections.ConfigDict:
  """Returns the config of a variant, one of `VARIANTS`."""
  if variant not in VARIANTS:
    raise ValueError(
      f'unknown variant {variant!r}: expected one of {", ".join(VARIANTS)}'
    )
  config = default_config()
  config.num_classes = 256
  config.reward.quality = 'minus_bits_per_byte'
  config.optimizer.name = 'adamw'
  _tiny(config)
  return config


def _tiny(config):
  """Two blocks of width 48, over 2 to 8 bits at the cost of INT3, on a CPU."""
  config.model = {
    'name': 'decoder', 'width': 1.0, 'hidden_size': 48, 'depth': 2, 'num_heads': 4,
    'num_kv_heads': 2, 'head_size': 12, 'mlp_size': 128, 'activation': 'gelu',
    'scales_embedding': True,
  }  # fmt: skip
  config.dataset = 'stdlib_text'
  config.input.context = 48
  config.batch_size, config.eval_batch_size = 32, 512
  config.num_steps = 1_000
  config.optimizer.learning_rate = 3e-3
  config.search.update(
    formats='int2,int3,int4,int8', num_samples=4, target_format='int3'
  )
