"""Recipes that files in `configs/` share: datasets and the training of whole families.

A recipe changes a config in place, and whoever calls it may change it further:

    config = recipes.start(variant, name='resnet50', width=1.0, small_images=False)
    if variant == 'imagenet':
      recipes.imagenet(config)
    else:
      recipes.digits(config, width=0.125, small_images=True)
"""

from typing import Any

import ml_collections

from fliqs_jax.runs.config import default_config

VARIANTS = ('imagenet', 'digits')

_IMAGENET_EXAMPLES = 1_281_167


def start(variant: str, **model: Any) -> ml_collections.ConfigDict:
  """Returns the default config with a network.

  Args:
    variant: one of `VARIANTS`, only checked.
    **model: the network's name and options, the fields of `config.model`.

  Raises:
    ValueError: where there is no such variant.
  """
  if variant not in VARIANTS:
    raise ValueError(
      f'unknown variant {variant!r}: expected one of {", ".join(VARIANTS)}'
    )
  config = default_config()
  config.model = model
  return config


def imagenet(
  config: ml_collections.ConfigDict,
  image_size: int = 224,
  epochs: int = 90,
  batch_size: int = 1024,
) -> None:
  """ImageNet, SGD on a cosine, and a search at 1.5 times the cost of INT4."""
  config.dataset = 'imagenet2012'
  config.num_classes = 1000
  config.batch_size = batch_size
  config.eval_batch_size = batch_size
  config.num_steps = epochs * _IMAGENET_EXAMPLES // batch_size
  config.dtype = 'bfloat16'
  config.checkpoint_every = 2_500
  config.log_every = 250
  config.input.update(
    image_shape=(image_size, image_size, 3),
    eval_split='validation',
    augmentation='crop_flip',
    mean=(0.485, 0.456, 0.406),
    stddev=(0.229, 0.224, 0.225),
    num_threads=16,
  )
  config.optimizer.update(
    learning_rate=0.1 * batch_size / 256,  # (Goyal et al., 2017)
    warmup_steps=5 * _IMAGENET_EXAMPLES // batch_size,
    weight_decay=1e-4,
    label_smoothing=0.1,
  )
  # INT4 is the cheapest option: a target at its cost would leave nothing to choose.
  config.search.update(
    formats='int_small', num_samples=8, target_format='int4', target_scale=1.5
  )


def lm1b(
  config: ml_collections.ConfigDict, batch_size: int, num_samples: int, **optimizer: Any
) -> None:
  """A search on the bytes of a billion words, over 4 and more bits.

  Args:
    config: changed in place.
    batch_size: windows a step, of 256 bytes, full of sentences.
    num_samples: of the policy, a step.
    **optimizer: options of AdamW.
  """
  _text(config)
  config.dataset = 'lm1b'
  config.input.update(context=256, packed=True, num_threads=16)
  config.batch_size = config.eval_batch_size = batch_size
  config.num_steps = 100_000
  config.dtype = 'bfloat16'
  config.checkpoint_every = 2_500
  config.log_every = 250
  config.optimizer.update(weight_decay=0.1, **optimizer)
  config.search.update(
    formats='int_small', num_samples=num_samples, target_format='int4', target_scale=1.5
  )


def stdlib_text(config: ml_collections.ConfigDict) -> None:
  """A search on the bytes of Python's library, over 2 to 8 bits at the cost of INT3.

  Args:
    config: changed in place.
  """
  _text(config)
  config.dataset = 'stdlib_text'
  config.input.context = 48
  config.batch_size, config.eval_batch_size = 32, 512
  config.num_steps = 1_000
  config.optimizer.learning_rate = 3e-3
  config.search.update(
    formats='int2,int3,int4,int8', num_samples=4, target_format='int3'
  )


def _text(config):
  config.num_classes = 256
  config.reward.quality = 'minus_bits_per_byte'
  config.optimizer.name = 'adamw'


def digits(
  config: ml_collections.ConfigDict, num_steps: int = 1_000, **model: Any
) -> None:
  """A search over 2 to 8 bits at the cost of INT3, for minutes on two cores.

  Args:
    config: changed in place.
    num_steps: of 64 images each.
    **model: options that make the network narrow, and fit for images of 8×8.
  """
  config.num_steps = num_steps
  config.batch_size = 64
  config.model.update(model)
  config.search.update(formats='int2,int3,int4,int8', target_format='int3')


def few_products(config: ml_collections.ConfigDict) -> None:
  """A search on the digits at INT4's cost, for layers whose sums have few products.

  Errors of 2 bits hardly cancel in those of depthwise convolutions and narrow layers:
  Inception-v3 learns little with them. MobileNetV2 was seen to diverge at the learning
  rate of the others.
  """
  config.search.update(formats='int3,int4,int8', target_format='int4')
  config.optimizer.learning_rate = 0.05


def efficientnet(
  variant: str, name: str, image_size: int, deep: bool = False
) -> ml_collections.ConfigDict:
  """Returns the config of an EfficientNet (Tan and Le, 2019, arXiv 1905.11946).

  The paper's RMSprop for 350 epochs, as in its authors' code (efficientnet of
  github.com/tensorflow/tpu), but on a cosine, without averaged weights, and with
  RandAugment, which needs no search of its own, in AutoAugment's place (Cubuk et al.,
  2020, report the same accuracy for both).

  Args:
    variant: one of `VARIANTS`.
    name: of the network.
    image_size: its resolution on ImageNet.
    deep: whether its steps on the digits must be smaller to end within minutes too.
  """
  config = start(variant, name=name, width=1.0, small_images=False)
  if variant == 'imagenet':
    imagenet(config, image_size, epochs=350)
    config.optimizer.update(
      name='rmsprop',
      learning_rate=0.016 * config.batch_size / 256,
      square_decay=0.9,
      epsilon=1e-3,
      weight_decay=1e-5,
    )
    config.input.augmentation = 'rand_augment'
  else:
    digits(config, width=0.25, small_images=True)
    few_products(config)
    if deep:
      # As many examples a sample, and none of the noise that slows learning.
      config.batch_size, config.search.num_samples = 32, 2
      config.model.update(dropout_rate=0.0, drop_path_rate=0.0)
  return config


def deit(variant: str, name: str, width_on_digits: float) -> ml_collections.ConfigDict:
  """Returns the config of a DeiT (Touvron et al., 2021, arXiv 2012.12877).

  The paper's training (Table 9, and github.com/facebookresearch/deit, main.py), but
  without repeated augmentation, and with a learning rate that ends at 0 instead of
  1e-5. What the table calls the probabilities of mixup and cutmix are their alphas in
  that code.

  Args:
    variant: one of `VARIANTS`.
    name: of the network.
    width_on_digits: what its heads allow.
  """
  config = start(variant, name=name, width=1.0, patch_size=16)
  if variant == 'imagenet':
    imagenet(config, epochs=300)
    config.optimizer.update(learning_rate=5e-4 * config.batch_size / 512)
    config.input.update(
      augmentation='rand_augment',
      rand_augment_magnitude=9.0,
      erasing=0.25,
      mixup_alpha=0.8,
      cutmix_alpha=1.0,
    )
  else:
    digits(config, width=width_on_digits, patch_size=2)
    config.optimizer.update(learning_rate=1e-3)
  config.optimizer.update(name='adamw', weight_decay=0.05)
  return config
