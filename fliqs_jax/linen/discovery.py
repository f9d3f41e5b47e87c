"""The layers of a network, found by tracing it, and what a search must know of each."""

import functools
import json
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from flax import linen as nn
from flax import traverse_util
import jax

from fliqs_jax.layers.architecture import Gate, LayerSizes, Table
from fliqs_jax.linen.operators import QuantizedOperator
from fliqs_jax.layers.call_counts import marked, marks


class Layer(NamedTuple):
  """What the search must know of one quantized layer; sizes are for one example."""

  path: str  # module path, `/`-separated
  operator: str  # name of the quantized operator within that module
  kind: str  # 'conv', 'dense', 'einsum' or 'conv_transpose'
  input_shape: tuple[int, ...]  # of one call, as the other shapes
  kernel_shape: tuple[int, ...]
  output_shape: tuple[int, ...]
  macs: int  # multiply-accumulates of all calls
  params: int  # parameters of the layer, its bias included
  arguments: tuple[tuple[str, Any], ...] = ()  # of the lax operation: strides, padding
  calls: int = 1  # in one forward pass: of a shared module, or in a scan
  kernels: int = 1  # of that shape: a scan over parameters has one an iteration
  # Of a supernet's layer, whose shapes above are the largest:
  sizes: LayerSizes | None = None  # as tables, None where nothing is decided
  axes: Any = None  # a `layers.Axes`
  gate: str = ''  # module path of the gate that its output goes through, if any


def discover(model: Any, *inputs: Any, **kwargs: Any) -> tuple[Layer, ...]:
  """Returns the quantized layers of a network in the order in which they compute.

  Traces `model.init` abstractly: nothing is computed or allocated.

  Args:
    model: a linen module whose layers carry the hooks of `layers`, or one from
      `searchable.make_searchable`.
    *inputs: one example in a batch of one, as arrays or `jax.ShapeDtypeStruct`.
    **kwargs: passed to `model.init`.
  """

  gates, latest = {}, []  # a gate's path, by that of the layer before it

  def record(call, args, kwargs, context):
    operator = context.module
    if isinstance(operator, Gate):  # it comes after a layer of its block
      gates[latest[-1]] = '/'.join(operator.path)
    if isinstance(operator, QuantizedOperator) and context.method_name == 'compute':
      product, x, w, contracted, *rest = args
      layer = _describe(operator, product, x, w, contracted)
      if any(isinstance(size, Table) for size in operator.sizes):
        layer = layer._replace(sizes=operator.sizes, axes=rest[-1])
      latest.append(layer.path)
      args = product, marked(x, w, layer), w, contracted, *rest
    return call(*args, **kwargs)

  with nn.intercept_methods(record):
    jaxpr, variables = jax.make_jaxpr(
      functools.partial(model.init, **kwargs), return_shape=True
    )(jax.random.key(0), *inputs)
  found = {}
  for layer, calls in marks(jaxpr):
    # A module that is called several times is one layer.
    macs, previous = layer.macs * calls, found.get(layer.path)
    if previous:
      macs, calls = macs + previous.macs, calls + previous.calls
    gate = gates.get(layer.path, '')
    found[layer.path] = layer._replace(macs=macs, calls=calls, gate=gate)
  params = traverse_util.flatten_dict(nn.unbox(variables['params']), sep='/')
  return tuple(_with_params(layer, params) for layer in found.values())


def _describe(operator, product, x, w, contracted):
  y = jax.eval_shape(product, x, jax.ShapeDtypeStruct(w.shape, x.dtype))
  *path, name = operator.path
  return Layer(
    path='/'.join(path),
    operator=name,
    kind=operator.kind,
    input_shape=x.shape,
    kernel_shape=w.shape,
    output_shape=y.shape,
    macs=operator.count_macs(x, w, y, contracted),
    params=0,
    arguments=_hashable(tuple(sorted(product.keywords.items()))),
  )


def _with_params(layer, params):
  own = {
    name.rpartition('/')[2]: leaf.size
    for name, leaf in params.items()
    if name.rpartition('/')[0] == layer.path
  }
  # A kernel that was made from several parameters is one.
  kernels = max(own.get('kernel', 0) // math.prod(layer.kernel_shape), 1)
  return layer._replace(params=sum(own.values()), kernels=kernels)


def layers_to_json(layers: Sequence[Layer]) -> str:
  """Returns layers as text, for `layers_from_json`."""
  return json.dumps(
    [layer._asdict() | {'arguments': dict(layer.arguments)} for layer in layers],
    default=str,
  )


def layers_from_json(text: str) -> tuple[Layer, ...]:
  """Returns the layers; of their arguments those that JSON has no type for as text."""
  return tuple(
    Layer(
      **{name: _hashable(value) for name, value in content.items()}
      | {'arguments': _hashable(sorted(content['arguments'].items()))}
    )
    for content in json.loads(text)
  )


def _hashable(value):
  """Lists as tuples, within tuples too; named ones stay as they are."""
  if type(value) in (list, tuple):
    return tuple(map(_hashable, value))
  return value
