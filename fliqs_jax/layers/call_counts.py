"""Numbers of calls of each layer: marks in a traced network, counted in its jaxpr.

The body of a scan is traced once (or twice) whatever its length, so calls cannot be
counted while Python runs. A mark is an operation that computes nothing; where it
stands in the jaxpr tells how often it would run.
"""

from collections.abc import Iterator
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching
import jax.numpy as jnp

from fliqs_jax.errors import ConfigError
from fliqs_jax.layers.layer import Layer

_mark = Primitive('layer_mark')
_mark.def_abstract_eval(lambda x, w, **_: x)
ad.primitive_jvps[_mark] = lambda primals, tangents, **params: (
  _mark.bind(*primals, **params),
  tangents[0],
)


def _batch(operands, axes, *, info, calls):
  """A mapped layer runs once for each element, whichever operand is mapped."""
  (x, w), (x_axis, w_axis) = operands, axes
  size = w.shape[w_axis] if x_axis is None else x.shape[x_axis]
  if x_axis is None:
    x, x_axis = jnp.broadcast_to(x, (size, *x.shape)), 0
  return _mark.bind(x, w, info=info, calls=calls * size), x_axis


batching.primitive_batchers[_mark] = _batch


def marked(x: jax.Array, w: jax.Array, info: Any) -> jax.Array:
  """Returns `x`, with a mark in the trace that carries `info`; only for tracing.

  Args:
    x: the first operand of a layer.
    w: the second; a mark is mapped where either operand is.
    info: hashable.
  """
  return _mark.bind(x, w, info=info, calls=1)


def marks(jaxpr: Any) -> Iterator[tuple[Any, int]]:
  """Yields the `info` of every mark and how often it runs, in order.

  In a scan as often as it has iterations. A branch counts as if it were taken.

  Args:
    jaxpr: from `jax.make_jaxpr`.

  Raises:
    ConfigError: for a mark in a loop of unknown length.
  """
  for equation in getattr(jaxpr, 'jaxpr', jaxpr).eqns:
    name, params = equation.primitive.name, equation.params
    if equation.primitive is _mark:
      yield params['info'], params['calls']
    for inner in _jaxprs(params.values()):
      for info, calls in marks(inner):
        if name == 'while':
          raise ConfigError(
            f'layer {info.path} runs in a loop of unknown length, so that its cost is '
            'unknown: use a scan, or leave it out with a promote_dtype of its own'
          )
        yield info, calls * (params['length'] if name == 'scan' else 1)


def count_layers(jaxpr: Any) -> dict[str, Layer]:
  """Returns the marked layers by path, in the order in which they first compute.

  A layer that is called several times is one, whose multiply-accumulates add up.

  Args:
    jaxpr: whose marks carry a `Layer` each.

  Raises:
    ConfigError: as `marks`.
  """
  found = {}
  for layer, calls in marks(jaxpr):
    macs, previous = layer.macs * calls, found.get(layer.path)
    if previous:
      macs, calls = macs + previous.macs, calls + previous.calls
    found[layer.path] = layer._replace(macs=macs, calls=calls)
  return found


def _jaxprs(values):
  for value in values:
    if isinstance(value, (tuple, list)):
      yield from _jaxprs(value)
    elif hasattr(value, 'eqns') or hasattr(value, 'jaxpr'):
      yield value
