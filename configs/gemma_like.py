"""Decoders like Llama and Gemma on lm1b, for a TPU v5e-64; `:tiny`, on a CPU.

    python -m fliqs_jax.main --config=configs/gemma_like.py:1b --workdir=gs://…
    python -m fliqs_jax.main --config=configs/gemma_like.py:tiny --workdir=DIR

`:1b` has the blocks of Llama 3.2 1B and `:7b` those of Gemma 7B, both on bytes, with
parameters split over all 64 chips. They have not been run. Sentences of lm1b are padded
to the context, not packed.
"""

import ml_collections

from fliqs_jax.models import decoder
from fliqs_jax.runs.config import default_config

VARIANTS = ('1b', '7b', 'tiny')


def get_config(variant: str = '1b') -> ml_collections.ConfigDict:
  """Returns the config of a variant, one of `VARIANTS`."""
  if variant not in VARIANTS:
    raise ValueError(
      f'unknown variant {variant!r}: expected one of {", ".join(VARIANTS)}'
    )
  config = default_config()
  config.num_classes = 256
  config.reward.quality = 'minus_bits_per_byte'
  config.optimizer.name = 'adamw'
  if variant == 'tiny':
    _tiny(config)
  else:
    _lm1b(config, decoder.LLAMA_3_2_1B if variant == '1b' else decoder.GEMMA_7B)
  return config


def _lm1b(config, sizes):
  """A published network's blocks on a billion words, over 4 and more bits."""
  sizes = {name: size for name, size in sizes.items() if name != 'vocabulary_size'}
  config.model = {'name': 'decoder', 'width': 1.0, **sizes, 'remat': True}
  config.dataset = 'lm1b'
  config.input.update(context=256, num_threads=16)
  config.fsdp = 64
  config.batch_size = config.eval_batch_size = 1_024
  config.num_steps = 100_000
  config.dtype = 'bfloat16'
  config.checkpoint_every = 2_500
  config.log_every = 250
  config.optimizer.update(learning_rate=3e-4, square_decay=0.95, weight_decay=0.1)
  config.search.update(
    formats='int_small', num_samples=4, target_format='int4', target_scale=1.5
  )


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
