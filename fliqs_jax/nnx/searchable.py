"""A user's own NNX network, unchanged, with its layers searched.

A network's state is carried by Flax's functional API: it is split into variables by
collection, nested dicts of arrays as linen has them, and merged for the time of a call.
"""

from collections.abc import Iterator, Mapping, Sequence
import inspect
from typing import Any

from flax import nnx, traverse_util
import jax
import jax.numpy as jnp

from fliqs_jax.layers import parameter_products
from fliqs_jax.layers.call_counts import count_layers
from fliqs_jax.layers.coverage import Coverage, check_not_quantized
from fliqs_jax.layers.layer import Layer
from fliqs_jax.layers.variables import FORMATS, QUANT_STATS
from fliqs_jax.nnx.hooks import hook_attention, set_hooks
from fliqs_jax.nnx.operators import QuantizedOperator, QuantStat

_PARAMS, _SOWN, _OTHERS = 'params', 'intermediates', 'others'
_COLLECTIONS = {
  _PARAMS: nnx.Param,
  'batch_stats': nnx.BatchStat,
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
      ConfigError: where the model is quantized already.
    """
    self.model = model
    for path, module in nnx.iter_modules(model):
      check_not_quantized(module, '/'.join(map(str, path)) or type(model).__name__)
    clone = nnx.clone(model)
    self._reasons = set_hooks(clone, attributes)
    if attention_products:
      hook_attention(clone, attributes)
    self._graph, *states, self._rest = nnx.split(clone, *_COLLECTIONS.values(), ...)
    self._states = dict(zip(_COLLECTIONS, map(nnx.to_flat_state, states)))

  def init(self, key: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Returns copies of the model's own variables by collection.

    The arguments are those of `nn.Module.init`, of which an instance needs none.
    """
    del key, args, kwargs
    return jax.tree.map(jnp.copy, self._variables)

  @property
  def own_variables(self) -> dict[str, Any] | None:
    """The model's own variables by collection, from which it trains."""
    return self._variables

  @property
  def _variables(self):
    return {
      name: _nested(state)
      for name, state in self._states.items()
      if name == _PARAMS or state
    }

  def variables_of(self, model: nnx.Module) -> dict[str, Any]:
    """Returns the variables by collection of a network of the same structure.

    Statistics of quantized layers, which it lacks, are those of this one.
    """
    _, *states, _ = nnx.split(model, *_COLLECTIONS.values(), ...)
    given = dict(zip(_COLLECTIONS, map(nnx.to_flat_state, states)))
    return self._variables | {name: _nested(s) for name, s in given.items() if s}

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
    bound = {'/'.join(path[:-2]): formats for path, formats in bound.items()}
    for operator in _operators(model):
      operator.bind(bound.get(operator.path))
    return model

  def coverage(self, *inputs: Any, **kwargs: Any) -> Coverage:
    """Returns which layers are searched, and why the others are not.

    Traces a call abstractly.

    Args:
      *inputs: one example in a batch of one, as arrays or `jax.ShapeDtypeStruct`.
      **kwargs: of the model's call.
    """
    sizes = {
      _strings(path): leaf.get_value().size for path, leaf in self._states[_PARAMS]
    }
    jaxpr, origins = self._traced(*inputs, **kwargs)
    found = tuple(
      layer._replace(params=_own_params(layer, sizes))
      for layer in count_layers(jaxpr).values()
    )
    multiplied = parameter_products.find(jaxpr, origins)
    return Coverage(found, self._skipped(found), _share(found, multiplied))

  def _traced(self, *inputs, **kwargs):
    """Returns the jaxpr of a call, and the origins of its arguments."""

    def forward(params, *inputs):
      model = self.merge({_PARAMS: params})
      for operator in _operators(model):
        operator.discovers = True
      return jax.tree.leaves(model(*inputs, **kwargs))

    params = self._variables[_PARAMS]
    jaxpr = jax.make_jaxpr(forward)(params, *inputs)
    origins = [
      (leaf.size, tuple(key.key for key in path))
      for path, leaf in jax.tree.leaves_with_path(params)
    ]
    return jaxpr, origins + [None] * (len(jaxpr.in_avals) - len(origins))

  def _skipped(self, found):
    searched = {layer.path for layer in found}
    skipped = {}
    for path, leaf in self._states[_PARAMS]:
      *module, name = _strings(path)
      module = '/'.join(module)
      layer = {module, f'{module}/{name}'.lstrip('/')}
      # Biases and scales alone make no layer, stacked ones neither.
      is_factor = leaf.get_value().ndim > 1 and name not in ('bias', 'scale')
      if is_factor and not layer & searched:
        skipped[module] = self._reasons.get(module, self._unknown(path[:-1]))
    return skipped

  def _unknown(self, path):
    for place, module in nnx.iter_modules(self.model):
      if place == path and isinstance(module, nnx.Embed):
        return 'nnx.Embed looks its rows up, which multiplies nothing'
    return _UNKNOWN


_UNKNOWN = (
  'its parameters are used outside of nnx.Conv, nnx.ConvTranspose, nnx.Linear, '
  'nnx.LinearGeneral, nnx.Einsum, nnx.Embed.attend and nnx.LoRA: write the product '
  'with one of these'
)


def _share(
  layers: Sequence[Layer],
  multiplied: Sequence[parameter_products.ParameterProduct],
) -> float | None:
  """Returns what part of the multiply-accumulates by parameters the layers have."""
  paths = {layer.path for layer in layers}
  macs = {True: 0, False: 0}
  for path, layer, *_ in multiplied:
    own = {'/'.join(path), '/'.join(path[:-1])}
    macs[bool(own & paths)] += layer.macs
  total = sum(macs.values())
  return macs[True] / total if total else None


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
  path = tuple(filter(None, layer.path.split('/')))
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
