"""A transformer of bytes on lm1b, for TPUs; `:stdlib`, a tiny one on Python's library.

    python -m fliqs_jax.main --config=configs/transformer_lm.py --workdir=gs://…
    python -m fliqs_jax.main --config=configs/transformer_lm.py:stdlib --workdir=DIR

`:blackwell` and `:ironwood` search on lm1b what these chips multiply natively. The
recipes for lm1b, whose sentences are packed into full windows, have not been run yet.
"""

import ml_collections

from fliqs_jax.runs import recipes
from fliqs_jax.runs.config import default_config

VARIANTS = ('lm1b', 'blackwell', 'ironwood', 'stdlib')


def get_config(variant: str = 'lm1b') -> ml_collections.ConfigDict:
  """Returns the config of a variant, one of `VARIANTS`."""
  if variant not in VARIANTS:
    raise ValueError(
      f'unknown variant {variant!r}: expected one of {", ".join(VARIANTS)}'
    )
  config = default_config()
  if variant == 'stdlib':
    _stdlib(config)
  else:
    _lm1b(config)
  if variant == 'blackwell':
    _blackwell(config)
  elif variant == 'ironwood':
    _ironwood(config)
  return config


def _lm1b(config):
  """Six blocks of width 512."""
  recipes.lm1b(
    config, batch_size=512, num_samples=8, learning_rate=1e-3, square_decay=0.98
  )
  config.model = {
    'name': 'transformer_lm', 'width': 1.0, 'hidden_size': 512, 'depth': 6,
    'num_heads': 8,
  }  # fmt: skip


def _blackwell(config):
  """NVFP4 and MXFP8, which B200 and B300 multiply natively, at a cost between them.

  The cost is the wider operand's bits, to which the rates of these chips are inverse.
  """
  config.search.update(
    formats='nvfp4,mxfp8_e4m3,bf16',
    device='b200',
    cost_model='linear_compute',
    target_format='nvfp4',
    target_scale=1.4,
  )


def _ironwood(config):
  """Formats for TPU7x, fp8 beside bf16, at a cost between the two."""
  config.quantizer.activation_scale = 'token'
  config.search.update(
    formats='device',
    device='tpu_7x',
    cost_model='linear_compute',
    target_format='e4m3',
    target_scale=1.2,
  )


def _stdlib(config):
  """Three blocks of width 48, on a CPU."""
  recipes.stdlib_text(config)
  config.model = {
    'name': 'transformer_lm', 'width': 1.0, 'hidden_size': 48, 'depth': 3,
    'num_heads': 4,
  }  # fmt: skip
