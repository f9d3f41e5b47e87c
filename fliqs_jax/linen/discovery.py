"""The layers of a linen network, found by tracing it."""

from collections.abc import Mapping
import functools
import math
from typing import Any

from flax import linen as nn
from flax import traverse_util
import jax

from fliqs_jax.errors import ConfigError
from fliqs_jax.layers.architecture import Table
from fliqs_jax.layers.call_counts import count_layers, marked, marks
from fliqs_jax.layers.layer import PAIR, Layer, describe, join_path
from fliqs_jax.linen.method_interceptors import intercept_methods
from fliqs_jax.linen.operators import QuantizedOperator
from fliqs_jax.linen.supernet import Gate


def discover(model: Any, *inputs: Any, **kwargs: Any) -> tuple[Layer, ...]:
  """Returns the quantized layers of a network in the order in which they compute.

  Traces `model.init` and `model.apply` abstractly: nothing is computed or allocated.

  Args:
    model: a linen module whose layers carry the hooks of `operators`, or one from
      `make_searchable`.
    *inputs: one example in a batch of one, as arrays or `jax.ShapeDtypeStruct`.
    **kwargs: passed to both.

  Examples:
    >>> from flax import linen as nn
    >>> import jax.numpy as jnp
    >>> from fliqs_jax.linen.discovery import discover
    >>> from fliqs_jax.linen.interception import make_searchable
    >>> model = make_searchable(nn.Sequential([nn.Dense(4), nn.relu, nn.Dense(2)]))
    >>> [(layer.path, layer.macs) for layer in discover(model, jnp.ones((1, 8)))]
    [('layers_0', 32), ('layers_2', 8)]
  """

  if hasattr(model, 'coverage'):
    return model.coverage(*inputs, **kwargs).layers
  return discover_hooked(
    model, init_shapes(model, *inputs, **kwargs), *inputs, **kwargs
  )


def init_shapes(model: Any, *inputs: Any, **kwargs: Any) -> dict[str, Any]:
  """Returns the shapes of a network's variables; the arguments are `discover`'s."""
  init = functools.partial(model.init, **kwargs)
  return jax.eval_shape(init, jax.random.key(0), *inputs)


def discover_hooked(
  model: Any, variables: Mapping[str, Any], *inputs: Any, **kwargs: Any
) -> tuple[Layer, ...]:
  """Returns the layers that have hooks, as `discover` does.

  Traces a call and not `init`, in which some modules call a layer more often.

  Args:
    model: the network.
    variables: their shapes, from `init_shapes`.
    *inputs: as in `discover`.
    **kwargs: as in `discover`.

  Raises:
    ConfigError: where a layer is in `nn.jit`.
  """
  gates, latest = {}, []  # a gate's path, by that of the layer before it

  def record(call, args, kwargs, context):
    module = context.module
    if isinstance(module, Gate):  # it comes after a layer of its block
      gates[latest[-1]] = '/'.join(module.path)
    if isinstance(module, QuantizedOperator) and context.method_name == _COMPUTE:
      x, w, product = args
      layer = _describe(module, x, w, product)
      latest.append(layer.path)
      args = marked(x, w, layer), w, product
    return call(*args, **kwargs)

  def call(variables, *inputs):
    mutable = [name for name in variables if name != 'params']
    rngs = {'params': jax.random.key(0)}  # to which all others fall back
    outputs = model.apply(variables, *inputs, mutable=mutable, rngs=rngs, **kwargs)
    # Others may be of a class of the user's that JAX cannot return.
    return [leaf for leaf in jax.tree.leaves(outputs) if isinstance(leaf, jax.Array)]

  with intercept_methods(record):
    jaxpr = jax.make_jaxpr(call)(variables, *inputs)
  _check_no_jit(jaxpr)
  params = traverse_util.flatten_dict(nn.unbox(variables['params']), sep='/')
  return tuple(
    _with_params(layer._replace(gate=gates.get(layer.path, '')), params)
    for layer in count_layers(jaxpr).values()
  )


def _check_no_jit(jaxpr):
  """Raises ConfigError where a module is in `nn.jit`.

  What it compiles outlives a call, and with it the formats of that call.
  """
  for equation in getattr(jaxpr, 'jaxpr', jaxpr).eqns:
    inner = [v for v in equation.params.values() if hasattr(v, 'eqns')]
    inner += [v.jaxpr for v in equation.params.values() if hasattr(v, 'jaxpr')]
    for content in inner:
      if equation.primitive.name in ('jit', 'pjit'):
        name = equation.params['name']
        if name in _NAMES_OF_NN_JIT or any(True for _ in marks(content)):
          raise ConfigError(
            'the network has a part in nn.jit, which keeps what it has compiled with '
            'the formats of another call: expected it without nn.jit, since the whole '
            'step is compiled anyway'
          )
      _check_no_jit(content)


# As its equations are called, around a class and around a method.
_NAMES_OF_NN_JIT = 'core_fn', '__call__'

# The method through which every operator computes, with the arguments (x, w, product).
_COMPUTE = QuantizedOperator.compute.__name__


def _describe(operator, x, w, product):
  *path, name = operator.path
  layer = describe(join_path(path), name, product, x, w)
  if any(isinstance(size, Table) for size in operator.sizes):
    return layer._replace(sizes=operator.sizes, axes=product.axes)
  return layer


def _with_params(layer, params):
  if layer.kind == PAIR:
    return layer
  own = {
    name.rpartition('/')[2]: leaf.size
    for name, leaf in params.items()
    if name.rpartition('/')[0] == layer.path
  }
  # A kernel that was made from several parameters is one.
  kernels = max(own.get('kernel', 0) // math.prod(layer.kernel_shape), 1)
  return layer._replace(params=sum(own.values()), kernels=kernels)
