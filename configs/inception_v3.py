"""Inception-v3 on ImageNet, for TPUs; `:digits`, a narrow one on scikit-learn's digits.

    python -m fliqs_jax.main --config=configs/inception_v3.py --workdir=gs://…
    python -m fliqs_jax.main --config=configs/inception_v3.py:digits --workdir=DIR

The resolution is the network's own, 299; at half the cost, there is
--config.input.image_shape=224,224,3. Weight decay and the auxiliary head's share of the
loss, 0.4, are those of TF-slim (github.com/tensorflow/models, research/slim).
"""

import ml_collections

from fliqs_jax.runs import recipes


def get_config(variant: str = 'imagenet') -> ml_collections.ConfigDict:
  """Returns the config of a variant, `imagenet` or `digits`."""
  config = recipes.start(
    variant, name='inception_v3', width=1.0, small_images=False, aux_head=False
  )
  if variant == 'imagenet':
    config.model.aux_head = True
    recipes.imagenet(config, image_size=299, epochs=100)
    config.optimizer.update(weight_decay=4e-5)
  else:
    recipes.digits(config, width=0.125, small_images=True)
    recipes.few_products(config)
  return config
