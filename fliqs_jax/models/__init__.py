"""Networks in plain Flax, one file for each family, and their names.

A network takes the classes of its layers as attributes. Without quantized ones it is
the float network.
"""

import functools
import inspect
from typing import Any

from flax import linen as nn
import jax.numpy as jnp

from fliqs_jax.errors import ConfigError, not_among
from fliqs_jax.layers.architecture import Choose, standard
from fliqs_jax.linen.operators import conv_hooks, dense_hooks
from fliqs_jax.models import (
  decoder,
  deit,
  efficientnet,
  encoder,
  inception_v3,
  mobilenet_v2,
  resnet,
  transformer_lm,
)
from fliqs_jax.nnx.drawn import Drawn

MODELS = {
  'resnet18': resnet.ResNet18,
  'resnet34': resnet.ResNet34,
  'resnet50': resnet.ResNet50,
  'resnet101': resnet.ResNet101,
  'mobilenet_v2': mobilenet_v2.MobileNetV2,
  'inception_v3': inception_v3.InceptionV3,
  'efficientnet_b0': efficientnet.EfficientNetB0,
  'efficientnet_b1': efficientnet.EfficientNetB1,
  'efficientnet_b2': efficientnet.EfficientNetB2,
  'efficientnet_b3': efficientnet.EfficientNetB3,
  'efficientnet_b4': efficientnet.EfficientNetB4,
  'deit_tiny': deit.DeiTTiny,
  'deit_small': deit.DeiTSmall,
  'deit_base': deit.DeiTBase,
  'transformer_lm': transformer_lm.TransformerLM,
  'decoder': decoder.Decoder,
  'encoder': encoder.MaskedLanguageModel,
}
OF_NNX = ('decoder', 'encoder')  # the others are of linen
# Of texts, which see all tokens and predict those that are hidden.
OF_HIDDEN_TOKENS = ('encoder',)


def create_model(
  name: str,
  num_classes: int,
  quantized: bool = True,
  operator: dict[str, Any] | None = None,
  dtype: Any = jnp.float32,
  choose: Choose = standard,
  attention_products: bool = False,
  **options: Any,
) -> nn.Module | Drawn:
  """Returns the network of that name.

  Args:
    name: a key of `MODELS`.
    num_classes: outputs of the classifier.
    quantized: whether the layers carry quantized operators; without them it is the
      float network.
    operator: attributes of `QuantizedOperator`.
    dtype: of the computation.
    choose: how its architecture is chosen, by default as published.
    attention_products: whether the products inside attention are searched too.
    **options: attributes of the network, such as `width`.

  Raises:
    ConfigError: where there is no such network; the message names the nearest one.
      Where its architecture is fixed, and is to be chosen, or the products inside
      its attention are to be searched and cannot be.
  """
  if name not in MODELS:
    raise ConfigError(not_among(f'unknown model {name!r}', name, MODELS))
  if not choose.is_standard:
    if not has_choices(name):
      names = ', '.join(filter(has_choices, MODELS))
      raise ConfigError(
        f'the architecture of model {name!r} cannot be chosen: expected one of {names}'
      )
    options['choose'] = choose
  if name in OF_NNX:
    make = functools.partial(
      MODELS[name], vocabulary_size=num_classes, dtype=dtype, **options
    )
    return Drawn(lambda rngs: make(rngs=rngs), operator or {}, attention_products)
  if attention_products:
    raise ConfigError(
      f'search.attention_products=True: expected False for model {name!r}; decoder '
      'takes it, and so does fliqs_jax.search, for a network of your own'
    )
  if quantized:
    operator = operator or {}
    options['conv'] = functools.partial(nn.Conv, **conv_hooks(**operator))
    options['dense'] = functools.partial(nn.Dense, **dense_hooks(**operator))
  return MODELS[name](num_classes=num_classes, dtype=dtype, **options)


def has_choices(name: str) -> bool:
  """Returns whether the architecture of a network of `MODELS` can be chosen."""
  return 'choose' in inspect.signature(MODELS[name]).parameters
