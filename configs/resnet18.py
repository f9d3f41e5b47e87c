"""ResNet-18 on ImageNet, for TPUs; `:digits`, a narrow one on scikit-learn's digits.

    python -m fliqs_jax.main --config=configs/resnet18.py --workdir=gs://…
    python -m fliqs_jax.main --config=configs/resnet18.py:digits --workdir=runs/digits
"""

import ml_collections

from fliqs_jax.config import default_config


def get_config(variant: str = 'imagenet') -> ml_collections.ConfigDict:
  """Returns the config of a variant, `imagenet` or `digits`."""
  variants = {'imagenet': _imagenet, 'digits': _digits}
  if variant not in variants:
    raise ValueError(
        f'unknown variant {variant!r} of configs/resnet18.py: expected one of '
        f'{", ".join(variants)}'
    )
  config = default_config()
  config.model = {
      'name': 'resnet18',
      'width': 1.0,
      'small_images': False,
      'project_first_block': False,
  }
  variants[variant](config)
  return config


def _imagenet(config):
  """90 epochs of the usual recipe; a search at 1.5 times the cost of INT4."""
  config.dataset = 'imagenet2012'
  config.num_classes = 1000
  config.batch_size = 1024
  config.eval_batch_size = 1024
  config.num_steps = 90 * 1_281_167 // config.batch_size
  config.dtype = 'bfloat16'
  config.checkpoint_every = 2_500
  config.log_every = 250
  config.input.update(
      image_shape=(224, 224, 3),
      eval_split='validation',
      augmentation='crop_flip',
      mean=(0.485, 0.456, 0.406),
      stddev=(0.229, 0.224, 0.225),
      num_threads=16,
  )
  config.optimizer.update(
      learning_rate=0.4,  # 0.1 for 256 images (Goyal et al., 2017)
      warmup_steps=5 * 1_281_167 // config.batch_size,
      weight_decay=1e-4,
      label_smoothing=0.1,
  )
  # INT4 is the cheapest option: a target at its cost would leave nothing to choose.
  config.search.update(
      formats='int_small', num_samples=8, target_format='int4', target_scale=1.5
  )


def _digits(config):
  """A search over 2 to 8 bits at the cost of INT3, in about a minute on two cores."""
  config.num_steps = 1_500
  config.batch_size = 64
  config.model.update(width=0.125, small_images=True)
  config.search.update(formats='int2,int3,int4,int8', target_format='int3')
