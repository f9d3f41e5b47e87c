"""The network that a config names: its module, its layers, and how it is trained."""

from collections.abc import Mapping
import json
from types import MappingProxyType
from typing import Any, NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp
import ml_collections

from fliqs_jax.layers import architecture as architecture_lib
from fliqs_jax import models
from fliqs_jax.layers import layer as layer_lib
from fliqs_jax.layers.layer import Layer
from fliqs_jax.layers.variants import architecture_decisions
from fliqs_jax.linen.discovery import discover
from fliqs_jax.training import preprocessing
from fliqs_jax.training import task as objectives
from fliqs_jax.layers.architecture import Choose, searched, standard
from fliqs_jax.training.train_state import Arguments


class Network(NamedTuple):
  """What is trained: a network, how it is called, and what its outputs are worth."""

  model: Any  # a linen module, or what `searchable.make_searchable` returns
  example: Arguments  # shapes of one example, in a batch of one
  layers: tuple[Layer, ...]
  objective: objectives.Objective


Architecture = Mapping[str, int]  # {decision: size}, empty for the standard one


def build_model(
  config: ml_collections.ConfigDict,
  quantized: bool = True,
  choose: Choose = standard,
) -> tuple[nn.Module, jax.ShapeDtypeStruct]:
  """Returns the network and the shape of one example.

  Args:
    config: the config.
    quantized: whether its layers carry quantized operators.
    choose: how its architecture is chosen.

  Raises:
    ValueError: where the network is unknown or lacks an option.
  """
  # Lists, as a config from JSON has them, are no options of a linen module.
  options = jax.tree.map(
    _tuples, config.model.to_dict(), is_leaf=lambda x: isinstance(x, list)
  )
  model = models.create_model(
    options.pop('name'),
    config.num_classes,
    quantized=quantized,
    operator=config.quantizer.to_dict(),
    dtype=jnp.dtype(config.dtype),
    choose=choose,
    **options,
  )
  return model, jax.ShapeDtypeStruct((1, *config.input.image_shape), jnp.float32)


def _tuples(value):
  return tuple(map(_tuples, value)) if isinstance(value, list) else value


def discover_layers(
  config: ml_collections.ConfigDict, choose: Choose = standard
) -> tuple[Layer, ...]:
  """Returns the quantized layers of a config's network.

  Those of a network that is not among `models` are in the config of its run.

  Args:
    config: the config.
    choose: how its architecture is chosen; `searched` gives the supernet's layers.

  Raises:
    ValueError: as `build_model`, or where the network does not fit its input.
  """
  if 'layers' in config.model:
    return layer_lib.from_json(json.loads(config.model.layers))
  model, inputs = build_model(config, choose=choose)
  where = (
    f'model {config.model.name!r} cannot be built for images of '
    f'{config.input.image_shape} at width {config.model.width}'
  )
  try:
    layers = discover(model, inputs, train=False)
  except (TypeError, ValueError, ArithmeticError) as error:
    # So few channels that none are left, or more than there are numbers for.
    none_left = isinstance(error, ZeroDivisionError)
    reason = 'a layer has no channels' if none_left else str(error).splitlines()[0]
    raise ValueError(f'{where}: {reason}') from None
  for layer in layers:
    sizes = layer.input_shape + layer.kernel_shape + layer.output_shape
    if min(sizes) == 0:
      raise ValueError(f'{where}: nothing is left of layer {layer.path}')
    if max(sizes) >= 2**31:
      raise ValueError(f'{where}: layer {layer.path} has an axis longer than 2³¹')
  return layers


def choose_architecture(
  config: ml_collections.ConfigDict, architecture: Architecture
) -> Choose:
  """Returns how a config's network of a given architecture is built.

  Raises:
    ValueError: where the network has no such architecture.
  """
  if not architecture:
    return standard
  supernet = discover_layers(config, searched)
  return architecture_lib.fix(
    architecture_decisions(supernet), architecture
  )


def searched_layers(
  config: ml_collections.ConfigDict, architecture: Architecture = MappingProxyType({})
) -> tuple[Layer, ...]:
  """Returns the layers that a config's search is over.

  Args:
    config: the config.
    architecture: the fixed one, of no effect where it is searched.

  Raises:
    ValueError: as `discover_layers` and `choose_architecture`.
  """
  return discover_layers(config, choose_searched(config, architecture))


def choose_searched(
  config: ml_collections.ConfigDict, architecture: Architecture
) -> Choose:
  """Returns how the network of a config's search is built.

  Args:
    config: the config.
    architecture: the fixed one, of no effect where it is searched.

  Raises:
    ValueError: where the network has no such architecture.
  """
  if config.search.decide != 'formats':
    return searched
  return choose_architecture(config, architecture)


def configured_network(
  config: ml_collections.ConfigDict, choose: Choose = standard
) -> Network:
  """Returns the classifier that a config names.

  Args:
    config: the config.
    choose: how its architecture is chosen.

  Raises:
    ValueError: as `discover_layers`.
  """
  model, image = build_model(config, choose=choose)
  objective = objectives.classification(
    config.reward.quality,
    config.optimizer.label_smoothing,
    config.optimizer.auxiliary_weight,
  )
  settings = config.input

  def arguments(batch, train):
    image = preprocessing.normalize(batch['image'], settings.mean, settings.stddev)
    return Arguments((image,), {'train': train})

  return Network(
    model=model,
    example=Arguments((image,), {'train': False}),
    layers=discover_layers(config, choose),
    objective=objective._replace(augment=_mixing(config), arguments=arguments),
  )


def _mixing(config):
  """Returns what training does to a batch, in the objective's form."""
  alphas = config.input.mixup_alpha, config.input.cutmix_alpha
  if not any(alphas):
    return lambda batch, key: batch
  return lambda batch, key: preprocessing.mix(batch, key, config.num_classes, *alphas)
