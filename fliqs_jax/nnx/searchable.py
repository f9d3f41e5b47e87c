"""A user's own NNX network, unchanged, with its layers searched.

A network's state is carried by Flax's functional API: it is split into variables by
collection, nested dicts of arrays as linen has them, and merged for the time of a call.
"""

from collections.abc import Iterator, Mapping
import inspect
from typing import Any

from flax import nnx, traverse_util
import jax
import jax.numpy as jnp

from fliqs_jax.errors import ConfigError
from fliqs_jax.layers import (
  parameter_products,
  product_evaluation,
  product_statistics,
)
from fliqs_jax.layers.call_counts import count_layers
from fliqs_jax.layers.coverage import Coverage, check_module, cover
from fliqs_jax.layers.layer import Layer
from fliqs_jax.layers.origins import CONSTANT, Parameters, Path
from fliqs_jax.layers.variables import FORMATS, QUANT_STATS
from fliqs_jax.nnx.bare_products import ATTRIBUTE, add_operators
from fliqs_jax.nnx.hooks import hook_attention, set_hooks
from fliqs_jax.nnx.operators import QuantizedOperator, QuantStat

_PARAMS, _BATCH_STATS = 'params', 'batch_stats'
_SOWN, _OTHERS = 'intermediates', 'others'
_COLLECTIONS = {
  _PARAMS: nnx.Param,
  _BATCH_STATS: nnx.BatchStat,
  QUANT_STATS: QuantStat,
  _OTHERS: nnx.Not(nnx.Any(nnx.RngState, nnx.Intermediate)),  # of the first filters
}


class Searchable:
  """The `init` and `apply` of a linen module, of an NNX module with quantized layers.

  The model itself is never changed: its clone carries the operators. The variables are
  the model's own, and `quant_stats`; `apply` takes the formats in the collection
  `formats`, made by `layers.nest`, and without them is the module's. A call with a list
  of mutable collections is one in training, any other is not. With `quant_stats` in
  place of the list, a call in evaluation measures these.
  """

  def __init__(
    self,
    model: nnx.Module,
    attributes: Mapping[str, Any],
    attention_products: bool = False,
  ):
    """Clones a model and gives the clone's layers their operators.

    Args:
      model: an NNX module.
      attributes: of `QuantizedOperator`.
      attention_products: whether the products inside attention are searched too.

    Raises:
      ConfigError: where the model is quantized already, or has a part of linen.
    """
    self.model = model
    for path, module in nnx.iter_modules(model):
      check_module(module, '/'.join(map(str, path)) or type(model).__name__)
      if isinstance(module, QuantizedOperator):
        place = '/'.join(map(str, path))
        raise ConfigError(
          f'{type(model).__name__} has formats already, in {place}: expected the '
          'network that was searched, and variables=result.variables for its weights'
        )
    clone = nnx.clone(model)
    self._attributes = dict(attributes)
    self._attention_products = attention_products
    self._handled = set_hooks(clone, attributes)
    if attention_products:
      hook_attention(clone, attributes)
    self._graph, *states, self._rest = nnx.split(clone, *_COLLECTIONS.values(), ...)
    self._states = dict(zip(_COLLECTIONS, map(nnx.to_flat_state, states)))

  def __repr__(self) -> str:
    return f'Searchable({type(self.model).__name__})'

  def init(self, key: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Returns copies of the model's own variables by collection.

    The arguments are those of `nn.Module.init`, of which an instance needs no key.
    """
    del key
    return jax.tree.map(jnp.copy, self._variables(*args, **kwargs))

  def own_variables(self, *args: Any, **kwargs: Any) -> dict[str, Any] | None:
    """Returns the model's own variables by collection, from which it trains.

    All moving averages are zeros at first.

    Args:
      *args: of the model's call, arrays or their shapes.
      **kwargs: of the model's call.
    """
    return self._variables(*args, **kwargs)

  def _variables(self, *args, **kwargs):
    _, found, bare = self._products(*self._traced(*args, **kwargs))
    own = {name: _nested(state) for name, state in self._states.items()}
    own = product_statistics.with_zeros(own, found, bare)
    return {name: tree for name, tree in own.items() if tree or name == _PARAMS}

  def variables_of(
    self, model: nnx.Module, *args: Any, **kwargs: Any
  ) -> dict[str, Any]:
    """Returns the variables by collection of a network of the same structure.

    Statistics of quantized layers, which it lacks, are those of this one.

    Args:
      model: the network.
      *args: of its call, arrays or their shapes.
      **kwargs: of its call.
    """
    _, *states, _ = nnx.split(model, *_COLLECTIONS.values(), ...)
    given = dict(zip(_COLLECTIONS, map(nnx.to_flat_state, states)))
    own = self._variables(*args, **kwargs)
    return own | {name: _nested(s) for name, s in given.items() if s}

  def apply(
    self,
    variables: Mapping[str, Any],
    *args: Any,
    mutable: Any = False,
    rngs: Mapping[str, jax.Array] | None = None,
    **kwargs: Any,
  ) -> Any:
    """As `nn.Module.apply`."""
    model = self.merge(variables)
    if mutable is False:  # as in linen, an empty list is no False
      pass
    elif mutable == QUANT_STATS:
      for operator in _operators(model):
        operator.use_running_average = False
    else:
      nnx.Module.train(model)
    if rngs:
      _reseed(model, rngs)
      if 'rngs' in inspect.signature(type(model).__call__).parameters:
        kwargs['rngs'] = nnx.Rngs(rngs.get('dropout', next(iter(rngs.values()))))
    outputs = model(*args, **kwargs)
    if mutable is False:
      return outputs
    sown = nnx.to_flat_state(nnx.pop(model, nnx.Intermediate))
    _, *states, _ = nnx.split(model, *_COLLECTIONS.values(), ...)
    updated = dict(zip(_COLLECTIONS, map(nnx.to_flat_state, states)))
    # Formats are among the others; they are bound for this call alone.
    updated[_OTHERS] = _like(updated[_OTHERS], self._states[_OTHERS])
    updated[QUANT_STATS] = [
      (path[1:] if path[0] == ATTRIBUTE else path, leaf)
      for path, leaf in updated[QUANT_STATS]
    ]
    updated[_SOWN] = sown
    names = [mutable] if isinstance(mutable, str) else mutable
    return outputs, {name: _nested(updated[name]) for name in names}

  def merge(self, variables: Mapping[str, Any]) -> nnx.Module:
    """Returns the network with variables, an NNX module as for evaluation.

    Args:
      variables: as in `apply`; those that are missing are the model's own.
    """
    states = []
    for name, own in self._states.items():
      given = traverse_util.flatten_dict(dict(variables.get(name, {})))
      states.append(
        nnx.from_flat_state(
          (path, leaf.replace(jnp.asarray(given[_strings(path)])))
          if _strings(path) in given
          else (path, leaf)
          for path, leaf in own
        )
      )
    model = nnx.merge(self._graph, *states, self._rest, copy=True)
    nnx.Module.eval(model)
    bound = traverse_util.flatten_dict(dict(variables.get(FORMATS, {})))
    by_path = {'/'.join(path[:-2]): formats for path, formats in bound.items()}
    for operator in _operators(model):
      operator.bind(by_path.get(operator.path))
    formats = {path[:-2]: value for path, value in bound.items() if _is_bare(path)}
    statistics = product_statistics.read(variables)
    if formats or statistics:
      add_operators(model, statistics, formats, self._attributes)
    return model

  def coverage(self, *inputs: Any, **kwargs: Any) -> Coverage:
    """Returns which layers are searched, and why the others are not.

    Traces a call abstractly.

    Args:
      *inputs: one example in a batch of one, as arrays or `jax.ShapeDtypeStruct`.
      **kwargs: of the model's call.
    """
    jaxpr, origins = self._traced(*inputs, **kwargs)
    layers, found, bare = self._products(jaxpr, origins)
    activations = ()
    if self._attention_products:
      activations = parameter_products.find_of_activations(jaxpr, origins)
    coverage = cover(
      found=found,
      activations=activations,
      hooked={_names(path): layer for path, layer in layers.items()},
      bare=bare,
      ndims={path: leaf.ndim for path, leaf in self._params.items()},
      handled=self._handled,
    )
    if not bare:
      return coverage
    names = ', '.join(map('/'.join, bare))
    note = f'{names}: quantized in the call of the network, not in its other methods'
    return coverage._replace(notes=(note,))

  def product_weights(
    self, variables: Mapping[str, Any], *args: Any, **kwargs: Any
  ) -> dict[Path, list[jax.Array | None]]:
    """Returns what products of bare parameters multiply by, each call of one.

    Args:
      variables: of the network, arrays.
      *args: of its call, of which shapes alone are read.
      **kwargs: of its call.
    """
    jaxpr, origins = self._traced(*args, **kwargs)
    own = {name: variables.get(name, {}) for name in (_PARAMS, _BATCH_STATS)}
    known = jax.tree.leaves(own)
    known += [None] * (len(origins) - len(known))
    return product_evaluation.weights(jaxpr.jaxpr, jaxpr.consts, origins, known)

  @property
  def _params(self):
    """The model's own parameters by path."""
    return {_strings(path): leaf.get_value() for path, leaf in self._states[_PARAMS]}

  def _products(self, jaxpr, origins):
    """Returns the layers, the products of parameters, and which of these are bare."""
    sizes = {path: leaf.size for path, leaf in self._params.items()}
    layers = {
      path: layer._replace(params=_own_params(layer, sizes))
      for path, layer in count_layers(jaxpr).items()
    }
    found = parameter_products.find(jaxpr, origins)
    return layers, found, parameter_products.outside_of(found, self._handled, sizes)

  def _traced(self, *inputs, **kwargs):
    """Returns the jaxpr of a call, and the origins of its arguments."""
    own = {name: _nested(self._states[name]) for name in (_PARAMS, _BATCH_STATS)}

    def forward(own, *inputs):
      model = self.merge(own)
      for operator in _operators(model):
        operator.discovers = True
      return jax.tree.leaves(model(*inputs, **kwargs))

    jaxpr = jax.make_jaxpr(forward)(own, *inputs)
    origins = [
      _origin(*(key.key for key in path), size=leaf.size)
      for path, leaf in jax.tree.leaves_with_path(own)
    ]
    return jaxpr, origins + [None] * (len(jaxpr.in_avals) - len(origins))


def _origin(collection, *path, size):
  # Statistics of the model follow from no input of the call.
  if collection == _PARAMS:
    return Parameters(size, path)
  return CONSTANT


def _is_bare(path):
  return path[-2] == parameter_products.OPERATOR


def _names(path):
  """Returns the names in a path with `/`."""
  return tuple(filter(None, path.split('/')))


def _strings(path):
  """Returns a path as keys of nested dicts; those of lists are numbers."""
  return tuple(map(str, path))


def _nested(state):
  return traverse_util.unflatten_dict(
    {_strings(path): leaf.get_value() for path, leaf in state}
  )


def _like(state, template):
  paths = {path for path, _ in template}
  return [(path, leaf) for path, leaf in state if path in paths]


def _own_params(layer: Layer, sizes: Mapping[tuple[str, ...], int]) -> int:
  """Returns the parameters of a layer's module, or the one that it is named after."""
  path = _names(layer.path)
  return sum(size for name, size in sizes.items() if path in (name, name[:-1]))


def _operators(model: nnx.Module) -> Iterator[QuantizedOperator]:
  for _, module in nnx.iter_modules(model):
    if isinstance(module, QuantizedOperator):
      yield module


def _reseed(model, rngs):
  # Streams of an `nnx.Rngs(0)` are all named `default`, and those that layers share a
  # key of would draw the same masks: each has a key of its own.
  streams = [n for _, n in nnx.iter_graph(model) if isinstance(n, nnx.RngStream)]
  for index, stream in enumerate(streams):
    key = rngs.get(stream.tag, rngs.get('dropout', next(iter(rngs.values()))))
    key, shape = jax.random.fold_in(key, index), stream.key.shape
    stream.key[...] = jax.random.split(key, shape) if shape else key
    stream.count[...] = jnp.zeros_like(stream.count[...])
