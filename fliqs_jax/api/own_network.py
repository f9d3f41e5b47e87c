"""A user's own network: made searchable, and checked with the batches given."""

from collections.abc import Callable
from typing import Any, NamedTuple

from flax import linen as nn
from flax import nnx
import jax
import ml_collections

from fliqs_jax.errors import ConfigError, not_among
from fliqs_jax.layers.coverage import Coverage
from fliqs_jax.layers.variants import architecture_decisions
from fliqs_jax.linen import interception
from fliqs_jax.nnx.searchable import Searchable as NnxSearchable
from fliqs_jax.numerics.calibration import ACTIVATION_SCALES, LAYER_CALIBRATIONS
from fliqs_jax.runs.config import default_config
from fliqs_jax.runs.network import Network
from fliqs_jax.training import user_task
from fliqs_jax.training.task import Batch, Metrics, Score

# A module of either interface of Flax.
Model = nn.Module | nnx.Module


class Scores(NamedTuple):
  """Functions of a user's task, as `user_task.make_task` takes them."""

  loss: Score | None
  quality: Score | None
  metrics: Callable[[Any, Batch], Metrics] | None
  inputs: str | Callable[[Batch], Any]


def make_searchable(
  model: Model, attention_products: bool = False, **attributes: Any
) -> interception.Searchable | NnxSearchable:
  """Returns the `init` and `apply` of a network whose layers are searched.

  Args:
    model: an instance of a linen or an NNX module, which is not changed. Searched are
      the convolutions, the dense layers (so the projections of attention), the einsums
      and all other products of a parameter, as `attend` of an embedding; layers with a
      hook of their own stay as they are.
    attention_products: whether the products inside attention, QKᵀ and AV, are searched
      too, as `search.attention_products` of a config.
    **attributes: of the quantized operators: calibration, momentum, activation_scale.

  Raises:
    ConfigError: where the model is anything else, or quantized already, or an attribute
      is unknown.

  Examples:
    >>> from flax import nnx
    >>> import jax.numpy as jnp
    >>> import fliqs_jax
    >>> model = fliqs_jax.make_searchable(nnx.Linear(8, 4, rngs=nnx.Rngs(0)))
    >>> print(model.coverage(jnp.ones((1, 8))))
    1 layer is searched:
    .: dense (8, 4), 32 MACs
    100.0% of the multiply-accumulates by parameters are searched
  """
  _check_attributes(attributes)
  if isinstance(model, nnx.Module):
    _check_weights(model)
    return NnxSearchable(model, attributes, attention_products)
  if isinstance(model, NnxSearchable):
    return model
  return interception.make_searchable(model, attention_products, **attributes)


def _check_attributes(attributes):
  known = default_config().quantizer
  if unknown := [name for name in attributes if name not in known]:
    given = f'unknown argument {unknown[0]!r}'
    raise ConfigError(not_among(given, unknown[0], known))
  for name, values in (
    ('calibration', LAYER_CALIBRATIONS),
    ('activation_scale', ACTIVATION_SCALES),
  ):
    if attributes.get(name, values[0]) not in values:
      given = f'{name}={attributes[name]!r}'
      raise ConfigError(not_among(given, attributes[name], values))


def _check_weights(model):
  for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)):
    if isinstance(leaf.get_value(), jax.ShapeDtypeStruct):
      raise ConfigError(
        f'{"/".join(map(str, path))} of {type(model).__name__} has a shape and no '
        'values, as of nnx.eval_shape: expected a network with weights'
      )


def describe_model(model):
  """Returns the field `model` of a config for a user's own network."""
  return {'name': type(model).__name__, 'width': 1.0}


def check_network(
  config: ml_collections.ConfigDict,
  model: Model,
  scores: Scores,
  first: Batch,
  evaluated: Batch,
) -> tuple[Network, Coverage]:
  """Returns the user's network as the loop takes it, and what of it is searched."""
  searchable = searchable_of(config, model)
  task = user_task.make_task(model, *scores)
  with user_task.misfits_named(model, task.arguments(first, True).args):
    task = user_task.check(searchable, task, scores.loss is None, first, evaluated)
  one = jax.tree.map(lambda a: a[:1], first)
  coverage, _ = coverage_of(searchable, model, task, one)
  example = _with_shapes(user_task.initial_arguments(searchable, task, one))
  return Network(searchable, example, coverage.layers, task), coverage


def searchable_of(config, model):
  """Returns the network with its layers searched, as a config says."""
  products = config.search.attention_products
  return make_searchable(model, products, **config.quantizer.to_dict())


def coverage_of(searchable, model, task, batch):
  """Returns what of a network is searched, and how it is called in evaluation."""
  called = _with_shapes(task.arguments(batch, False))
  with user_task.misfits_named(model, called.args), user_task.call_named('evaluation'):
    coverage = searchable.coverage(*called.args, **called.kwargs)
  name = type(model).__name__
  if not coverage.layers:
    reasons = (
      f'{path or "the network"}: {why}' for path, why in coverage.skipped.items()
    )
    raise ConfigError(f'no layer of {name} can be searched', *reasons)
  if architecture_decisions(coverage.layers):
    raise ConfigError(
      f'the architecture of {name} is left open: fliqs_jax.search decides formats '
      'alone, python -m fliqs_jax.main the architecture too'
    )
  return coverage, called


def _with_shapes(arguments):
  shape = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype)
  return arguments._replace(args=jax.tree.map(shape, arguments.args))
