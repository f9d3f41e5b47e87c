"""Networks whose quantized layers compute by another function, or show their inputs."""

from collections.abc import Callable, Iterator
import contextlib
from typing import Any

import jax

from fliqs_jax.linen.method_interceptors import intercept_methods
from fliqs_jax.linen.operators import QuantizedOperator
from fliqs_jax.numerics.products import Product

# (module path, x, w, product) -> what `QuantizedOperator.arithmetic` returns first
Compute = Callable[[str, jax.Array, jax.Array, Product], Any]


@contextlib.contextmanager
def replaced_layers(compute: Compute) -> Iterator[None]:
  """Lets the quantized layers of all networks that are applied within it compute so.

  Their formats, weights and statistics are then for the function to know.
  """

  def replace(call, args, kwargs, context):
    module = context.module
    if not isinstance(module, QuantizedOperator) or context.method_name != _COMPUTE:
      return call(*args, **kwargs)
    return compute('/'.join(module.path[:-1]), *args)

  with intercept_methods(replace):
    yield


# (module path, x, w, product), of what a layer computes
Observe = Callable[[str, jax.Array, jax.Array, Product], None]


@contextlib.contextmanager
def observed_layers(observe: Observe) -> Iterator[None]:
  """Shows a function what the quantized layers are given within it."""

  def show(call, args, kwargs, context):
    module = context.module
    if isinstance(module, QuantizedOperator) and context.method_name == _COMPUTE:
      observe('/'.join(module.path[:-1]), *args)
    return call(*args, **kwargs)

  with intercept_methods(show):
    yield


_COMPUTE = QuantizedOperator.compute.__name__
