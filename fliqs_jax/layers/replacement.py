"""Quantized layers that compute by another function, or show their inputs.

They are those of all networks that are called within a context, of either interface of
Flax.
"""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import contextvars
from typing import Any

import jax
from jax.extend.core import get_opaque_trace_state

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
  """Shows a function what the quantized layers of Flax are given.

  Layers within transformations of the network, as scans and rematerialisation, are left
  out, since nothing comes out of their traces.
  """
  outside = get_opaque_trace_state()

  def observe_here(*shown):
    if get_opaque_trace_state() == outside:
      observe(*shown)

  return _set(_observe, observe_here)


class Observations:
  """Inputs and kernels that layers have shown within a trace, to be shown outside.

  Attributes:
    arrays: (x, w) of each layer.
  """

  def __init__(self):
    self.arrays = []
    self._layers = []

  def add(self, path: str, x: jax.Array, w: jax.Array, product: Product) -> None:
    """Adds what a layer is given."""
    self._layers.append((path, product))
    self.arrays.append((x, w))

  def show(self, arrays: Sequence[tuple[jax.Array, jax.Array]]) -> None:
    """Shows what was added to the observer outside of the trace, if there is one.

    Args:
      arrays: the attribute's, as they came out of the trace.
    """
    if observe := observer():
      for (path, product), (x, w) in zip(self._layers, arrays, strict=True):
        observe(path, x, w, product)


@contextlib.contextmanager
def observed_in_trace() -> Iterator[Observations]:
  """Keeps what layers show while a network is traced; nothing without an observer."""
  observations = Observations()
  context = contextlib.nullcontext()
  if observer():
    context = observed_layers(observations.add)
  with context:
    yield observations


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
