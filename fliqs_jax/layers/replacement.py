"""Quantized layers that compute by another function, or show their inputs.

They are those of all networks that are called within a context, of either interface of
Flax.
"""

from collections.abc import Callable, Iterator
import contextlib
import contextvars
from typing import Any

import jax

from fliqs_jax.numerics.products import Product

# (layer path, x, w, product) -> what the layer's operator computes
Compute = Callable[[str, jax.Array, jax.Array, Product], Any]
# (layer path, x, w, product), of what a layer computes
Observe = Callable[[str, jax.Array, jax.Array, Product], None]

_compute = contextvars.ContextVar('compute', default=None)
_observe = contextvars.ContextVar('observe', default=None)


def replaced_layers(compute: Compute) -> contextlib.AbstractContextManager[None]:
  """Lets quantized layers compute so, products of bare parameters among them.

  Their formats, weights and statistics are then for the function to know.
  """
  return _set(_compute, compute)


def observed_layers(observe: Observe) -> contextlib.AbstractContextManager[None]:
  """Shows a function what the quantized layers of Flax are given."""
  return _set(_observe, observe)


def replacement() -> Compute | None:
  """Returns what computes in the place of a layer, if anything does."""
  return _compute.get()


def observer() -> Observe | None:
  """Returns what layers show their inputs to, if anything."""
  return _observe.get()


@contextlib.contextmanager
def _set(variable, value) -> Iterator[None]:
  token = variable.set(value)
  try:
    yield
  finally:
    variable.reset(token)
