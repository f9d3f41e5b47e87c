"""The network that a config names: its module, its layers, and its task."""

from collections.abc import Mapping
import functools
from types import MappingProxyType
from typing import Any, NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp
import ml_collections

from fliqs_jax import models
from fliqs_jax.errors import ConfigError
from fliqs_jax.layers import architecture as architecture_lib
from fliqs_jax.layers.architecture import Choose, searched, standard
from fliqs_jax.layers.layer import Layer
from fliqs_jax.layers.variants import architecture_decisions
from fliqs_jax.linen.discovery import discover
from fliqs_jax.nnx import Searchable
from fliqs_jax.training import preprocessing
from fliqs_jax.training.classification import classification
from fliqs_jax.training.language_modelling import language_modelling
from fliqs_jax.training.masked_language_modelling import masked_language_modelling
from fliqs_jax.training.task import Batch, Task
from fliqs_jax.training.train_state import Arguments

Architecture = Mapping[str, int]  # {decision: size}, empty for the standard one


class Network(NamedTuple):
  """A network, how it is called, and the task that it is trained for."""

  model: nn.Module  # with quantized layers
  example: Arguments  # shapes of one example, in a batch of one
  layers: tuple[Layer, ...]
  task: Task


def own_variables(model: Any, example: Arguments) -> dict[str, Any] | None:
  """Returns the variables that a network has already, None where `init` makes them.

  Args:
    model: a linen module, or a `Searchable` of either interface.
    example: what it is called with.
  """
  if isinstance(model, nn.Module):
    return None
  return model.own_variables(*example.args, **example.kwargs)


def build_network(
  config: ml_collections.ConfigDict, choose: Choose = standard
) -> Network:
  """Returns the network that a config names, a classifier or a language model.

  Args:
    config: the config.
    choose: how its architecture is chosen.

  Raises:
    ConfigError: as `build_model`, or where the network does not fit its input.
  """
  model = build_model(config, choose=choose)
  return Network(
    model=model,
    example=Arguments((_example(config),), {'train': False}),
    layers=_discover(config, model),
    task=build_task(config),
  )


def build_model(
  config: ml_collections.ConfigDict,
  quantized: bool = True,
  choose: Choose = standard,
) -> nn.Module:
  """Returns the module that a config names.

  Args:
    config: the config.
    quantized: whether its layers carry quantized operators.
    choose: how its architecture is chosen.

  Raises:
    ConfigError: where the network is unknown or lacks an option, as the products
      inside attention.
  """
  # Lists, as a config from JSON has them, are no options of a linen module.
  options = jax.tree.map(
    _tuples, config.model.to_dict(), is_leaf=lambda x: isinstance(x, list)
  )
  return models.create_model(
    options.pop('name'),
    config.num_classes,
    quantized=quantized,
    operator=config.quantizer.to_dict(),
    dtype=jnp.dtype(config.dtype),
    choose=choose,
    # Configs of older workdirs do not have the field.
    attention_products=bool(config.search.get('attention_products')),
    **options,
  )


def _tuples(value):
  return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _takes_text(config):
  # Configs of older workdirs do not have the field.
  return config.input.get('context') is not None


def _example(config):
  """Returns the shape of what a config's network is called with, in a batch of one."""
  if _takes_text(config):
    return jax.ShapeDtypeStruct((1, config.input.context), jnp.int32)
  return jax.ShapeDtypeStruct((1, *config.input.image_shape), jnp.float32)


def build_task(config: ml_collections.ConfigDict) -> Task:
  """Returns the task that a config describes: of images in 0 … 255, or of bytes."""
  if _takes_text(config):
    predicts_hidden = config.model.name in models.OF_HIDDEN_TOKENS
    make = masked_language_modelling if predicts_hidden else language_modelling
    return make(config.reward.quality)
  return _build_classification(config)


def _build_classification(config):
  settings = config.input

  def arguments(batch: Batch, train: bool) -> Arguments:
    image = preprocessing.normalize(batch['image'], settings.mean, settings.stddev)
    return Arguments((image,), {'train': train})

  task = classification(
    config.reward.quality,
    config.optimizer.label_smoothing,
    config.optimizer.auxiliary_weight,
  )._replace(arguments=arguments)
  if not settings.mixup_alpha and not settings.cutmix_alpha:
    return task
  return task._replace(
    augment=functools.partial(
      preprocessing.mix,
      num_classes=config.num_classes,
      mixup_alpha=settings.mixup_alpha,
      cutmix_alpha=settings.cutmix_alpha,
    )
  )


def discover_layers(
  config: ml_collections.ConfigDict, choose: Choose = standard
) -> tuple[Layer, ...]:
  """Returns the quantized layers of a config's network.

  Args:
    config: the config.
    choose: how its architecture is chosen; `searched` gives the supernet's layers.

  Raises:
    ConfigError: as `build_network`.
  """
  return _discover(config, build_model(config, choose=choose))


def _discover(config, model):
  """Returns the layers of a model, where it fits the config's input."""
  example = _example(config)
  what = 'texts' if _takes_text(config) else 'images'
  where = (
    f'model {config.model.name!r} cannot be built for {what} of {example.shape[1:]} at '
    f'width {config.model.width}'
  )
  try:
    layers = _layers(model, example)
  except (TypeError, ValueError, ArithmeticError) as error:
    # So few channels that none are left, or more than there are numbers for.
    none_left = isinstance(error, ZeroDivisionError)
    reason = 'a layer has no channels' if none_left else str(error).splitlines()[0]
    raise ConfigError(f'{where}: {reason}') from None
  for layer in layers:
    sizes = layer.input_shape + layer.kernel_shape + layer.output_shape
    if min(sizes) == 0:
      raise ConfigError(f'{where}: nothing is left of layer {layer.path}')
    if max(sizes) >= 2**31:
      raise ConfigError(f'{where}: layer {layer.path} has an axis longer than 2³¹')
  return layers


def _layers(model, example):
  if isinstance(model, Searchable):
    return model.coverage(example, train=False).layers
  return discover(model, example, train=False)


def choose_architecture(
  config: ml_collections.ConfigDict, architecture: Architecture
) -> Choose:
  """Returns how a config's network of a given architecture is built.

  Raises:
    ConfigError: where the network has no such architecture.
  """
  if not architecture:
    return standard
  supernet = discover_layers(config, searched)
  return architecture_lib.fix(architecture_decisions(supernet), architecture)


def choose_searched(
  config: ml_collections.ConfigDict, architecture: Architecture
) -> Choose:
  """Returns how the network of a config's search is built.

  Args:
    config: the config.
    architecture: the fixed one, of no effect where it is searched.

  Raises:
    ConfigError: where the network has no such architecture.
  """
  if config.search.decide != 'formats':
    return searched
  return choose_architecture(config, architecture)


def searched_layers(
  config: ml_collections.ConfigDict, architecture: Architecture = MappingProxyType({})
) -> tuple[Layer, ...]:
  """Returns the layers that a config's search is over.

  Args:
    config: the config.
    architecture: the fixed one, of no effect where it is searched.

  Raises:
    ConfigError: as `discover_layers` and `choose_architecture`.
  """
  return discover_layers(config, choose_searched(config, architecture))
