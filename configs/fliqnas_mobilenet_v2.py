"""FLIQNAS: MobileNetV2's architecture and formats in one search.

python -m fliqs_jax.main --config=configs/fliqnas_mobilenet_v2.py --workdir=gs://…
python -m fliqs_jax.main --config=configs/fliqnas_mobilenet_v2.py:digits --workdir=DIR

The target is a multiple of the standard network's cost, whose widths are multiplied by
0.5 to 2. Until `search.policy_delay` the weights train under random architectures.
`:digits` takes seven minutes on one CPU core: one-shot 97.2 % at 0.980 of the target.
"""

import ml_collections

from fliqs_jax.runs import recipes


def get_config(variant: str = 'imagenet') -> ml_collections.ConfigDict:
  """Returns the config of a variant, `imagenet` or `digits`."""
  config = recipes.start(variant, name='mobilenet_v2', width=1.0, small_images=False)
  if variant == 'imagenet':
    recipes.imagenet(config, epochs=150)
    # So small a network underfits under the decay that larger ones need.
    config.optimizer.update(
      learning_rate=0.05 * config.batch_size / 256, weight_decay=4e-5
    )
  else:
    recipes.digits(
      config,
      width=0.5,
      small_images=True,
      stages=((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 2, 2)),
      last_filters=64,
      kernels=(3, 5),
      multipliers=(0.5, 1.0, 1.5),
    )
    recipes.few_products(config)
  config.search.decide = 'both'
  return config
