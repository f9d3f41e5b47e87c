"""A user's own NNX network, unchanged, with its layers searched."""

from collections.abc import Mapping
from typing import Any

from flax import nnx, traverse_util
import jax
import jax.numpy as jnp

from fliqs_jax.errors import ConfigError
from fliqs_jax.layers.call_counts import marked, marks
from fliqs_jax.layers.layer import Layer, describe
from fliqs_jax.nnx.operators import (
  QuantizedConv,
  QuantizedDotGeneral,
  QuantizedOperator,
  QuantStat,
  promote_all_but_kernel,
)

# The hook of each layer, what it holds where the user set none, and its operator.
_HOOKS = {
  nnx.Conv: ('conv_general_dilated', jax.lax.conv_general_dilated, QuantizedConv),
  nnx.Linear: ('dot_general', jax.lax.dot_general, QuantizedDotGeneral),
  nnx.LinearGeneral: ('dot_general', jax.lax.dot_general, QuantizedDotGeneral),
}
_COLLECTIONS = {
  'params': nnx.Param,
  'batch_stats': nnx.BatchStat,
  'quant_stats': QuantStat,
}


class Searchable:
  """The `init` and `apply` of a linen module, of an NNX module with quantized layers.

  The model itself is never changed: its clone carries the operators. A call with a
  list of mutable collections is one in training, any other is not.
  """

  def __init__(self, model: nnx.Module, attributes: Mapping[str, Any]):
    """Clones a model and gives the clone's layers their operators.

    Args:
      model: an NNX module.
      attributes: of `QuantizedOperator`.

    Raises:
      ConfigError: where the model is anything else.
    """
    if not isinstance(model, nnx.Module):
      raise ConfigError(
        f'expected an NNX module, as Network(rngs=...), found {model!r}'
      )
    self.model = model
    clone = nnx.clone(model)
    # Listed first, since operators are modules too.
    for _, layer in list(nnx.iter_modules(clone)):
      name, default, operator = _HOOKS.get(type(layer), (None, None, None))
      if name and getattr(layer, name) in (None, default):
        if getattr(layer, f'{name}_cls', None) is None:
          setattr(layer, name, nnx.data(operator(**attributes)))
          layer.promote_dtype = promote_all_but_kernel
    self._graph, *states, self._rest = nnx.split(clone, *_COLLECTIONS.values(), ...)
    self._states = dict(zip(_COLLECTIONS, states))

  def init(self, key: jax.Array, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Returns copies of the model's own variables by collection."""
    del key, args, kwargs  # an instance has its values already
    return {
      name: jax.tree.map(jnp.copy, nnx.to_pure_dict(state))
      for name, state in self._states.items()
      if name == 'params' or jax.tree.leaves(state)
    }

  def apply(
    self,
    variables: Mapping[str, Any],
    *args: Any,
    mutable: Any = False,
    rngs: Mapping[str, jax.Array] | None = None,
    **kwargs: Any,
  ) -> Any:
    """As `nn.Module.apply`; formats are those of the collection `formats`."""
    model = self._merged(variables)
    formats = traverse_util.flatten_dict(dict(variables.get('formats', {})))
    bound = {'/'.join(path[:-1]): value for path, value in formats.items()}
    training = mutable is not False  # as in linen, an empty list is no False
    (model.train if training else model.eval)()
    for path, operator in _operators(model):
      operator.updates = training and 'quant_stats' in mutable
      operator.formats = nnx.data(bound.get(path))
    if rngs:
      _reseed(model, rngs)
    outputs = model(*args, **kwargs)
    if not training:
      return outputs
    return outputs, {
      name: nnx.to_pure_dict(nnx.state(model, _COLLECTIONS[name])) for name in mutable
    }

  def discover(self, *inputs: Any, **kwargs: Any) -> tuple[Layer, ...]:
    """Returns the quantized layers in the order in which they compute.

    Args:
      *inputs: one example in a batch of one, as arrays or `jax.ShapeDtypeStruct`.
      **kwargs: of the model's call.
    """

    def forward(*inputs):
      model = self._merged(self.init(jax.random.key(0)))
      model.eval()
      for path, operator in _operators(model):
        operator.record = _recorder(path)
      return model(*inputs, **kwargs)

    found = {}
    for layer, calls in marks(jax.make_jaxpr(forward)(*inputs)):
      macs, previous = layer.macs * calls, found.get(layer.path)
      if previous:
        macs, calls = macs + previous.macs, calls + previous.calls
      found[layer.path] = layer._replace(macs=macs, calls=calls)
    params = _flat(nnx.to_pure_dict(self._states['params']))
    return tuple(
      layer._replace(
        params=sum(
          leaf.size
          for name, leaf in params.items()
          if name.rpartition('/')[0] == layer.path
        )
      )
      for layer in found.values()
    )

  def _merged(self, variables):
    states = []
    for name, state in self._states.items():
      state = jax.tree.map(lambda leaf: leaf, state)  # replaced in place below
      nnx.replace_by_pure_dict(state, variables.get(name, {}))
      states.append(state)
    return nnx.merge(self._graph, *states, self._rest, copy=True)


def _reseed(model, rngs):
  # Streams of an `nnx.Rngs(0)` are all named `default`, and those that layers share a
  # key of would draw the same masks: each has a key of its own.
  streams = [node for _, node in nnx.iter_graph(model) if type(node) is nnx.RngStream]
  for index, stream in enumerate(streams):
    key = rngs.get(stream.tag, rngs.get('dropout', next(iter(rngs.values()))))
    stream.key[...] = jax.random.fold_in(key, index)
    stream.count[...] = jnp.zeros_like(stream.count[...])


def _operators(model):
  for path, module in nnx.iter_modules(model):
    if isinstance(module, QuantizedOperator):
      yield '/'.join(map(str, path)), module


def _recorder(path):
  *layer_path, name = path.split('/')

  def record(x, w, product):
    return marked(x, w, describe('/'.join(layer_path), name, product, x, w))

  return record


def _flat(tree):
  return {
    '/'.join(map(str, path)): leaf
    for path, leaf in traverse_util.flatten_dict(tree).items()
  }
