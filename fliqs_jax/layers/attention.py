"""Products inside attention, QKᵀ and AV, of any function of query, key and value.

Traced alone, such a function has a product of the key and a product of the value.
They are found, and computed in another way, as the products of parameters are, with
key and value in the place of parameters. So masks, biases, dropout and grouped heads
are those of the function itself.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
import contextlib
import contextvars
import functools
import inspect
import math
import sysconfig
from typing import Any, NamedTuple

from flax import linen as nn
from flax import nnx
import jax

from fliqs_jax.layers import call_counts, parameter_products, product_evaluation
from fliqs_jax.layers.layer import PAIR, Layer
from fliqs_jax.layers.origins import Origin, Parameters
from fliqs_jax.numerics.products import (
  LayerFormats,
  PairStatistics,
  quantized_pair_product,
)

OPERATOR = 'attention'  # in the place of a quantized operator's name
QK, AV = 'qk', 'av'  # the products

_NAME = 'dot_product_attention'
# Where there are functions that compute attention, under this name.
_PLACES = tuple((vars(place), _NAME) for place in (jax.nn, nn, nnx))
FUNCTIONS = tuple(content[name] for content, name in _PLACES)
# Packages whose modules are not looked into.
_LIBRARIES = ('jax', 'flax')
# The scope, in a trace, of attention whose products are found.
SCOPE = 'searched_attention'

# The content of a module, and a name in it.
Place = tuple[dict[str, Any], str]
# (function of query, key and value alone, query, key, value) -> its outputs
Handler = Callable[..., Any]
_handler = contextvars.ContextVar('handler', default=None)


@contextlib.contextmanager
def handled_by(handler: Handler) -> Iterator[None]:
  """Lets a handler compute all attention within it that a `hooked` function computes.

  `jax.nn.dot_product_attention`, and those of `flax.linen` and `flax.nnx`, are hooked
  meanwhile.
  """
  token = _handler.set(handler)
  try:
    with hooked_in(_PLACES):
      yield
  finally:
    _handler.reset(token)


@contextlib.contextmanager
def hooked_in(places: Iterable[Place]) -> Iterator[None]:
  """Hooks the functions of attention in some places meanwhile."""
  previous = [(*place, place[0][place[1]]) for place in places]
  for content, name, function in previous:
    content[name] = hooked(function)
  try:
    yield
  finally:
    for content, name, function in previous:
      content[name] = function


def hooked(function: Callable[..., Any]) -> Callable[..., Any]:
  """Returns a function of attention that lets a handler compute, where there is one."""

  @functools.wraps(function)
  def attend(query, key, value, *args, **kwargs):
    handler = _handler.get()
    on_activations = lambda *qkv: function(*qkv, *args, **kwargs)
    # A module that keeps the attention's weights could not do so in a trace of its own.
    if handler is None or kwargs.get('module') is not None:
      return on_activations(query, key, value)
    token = _handler.set(None)  # one such function may call another
    try:
      return handler(on_activations, query, key, value)
    finally:
      _handler.reset(token)

  return attend


def is_attention(value: Any) -> bool:
  """Returns whether a value is one of the functions of attention."""
  # Of a module of linen, to ask for an attribute that it lacks may run its `setup`.
  if not callable(value) or isinstance(value, nn.Module | nnx.Module):
    return False
  given = value, getattr(value, '__wrapped__', None)  # as of a hooked one
  return any(one is function for one in given for function in FUNCTIONS)


class Uses(NamedTuple):
  """Functions of attention that the methods of a class use."""

  any: bool  # whether they call one, as far as their code tells
  places: tuple[Place, ...]  # where one has a name of its own


@functools.cache
def uses_of(kind: type) -> Uses:
  """Returns how a module's class uses functions of attention.

  Looked into are its methods, and the functions that their code names.

  Args:
    kind: of either interface.
  """
  found, seen, names, places = list(_methods(kind)), set(), set(), {}
  package = _top_package(kind.__module__)
  while found:
    function = found.pop()
    if function in seen:
      continue
    seen.add(function)
    for code in _codes(function.__code__):
      names |= set(code.co_names)
      for content, name in _named(function.__globals__, code.co_names):
        value = content[name]
        if is_attention(value):
          places[id(content), name] = content, name
        elif inspect.isfunction(value):
          value = inspect.unwrap(value)
          if inspect.isfunction(value) and not _is_installed(value, package):
            found.append(value)
  return Uses(_NAME in names or bool(places), tuple(places.values()))


def _methods(kind):
  for base in kind.__mro__:
    if not _is_of_library(base.__module__):
      for value in vars(base).values():
        value = inspect.unwrap(getattr(value, '__func__', value))
        if inspect.isfunction(value):
          yield value


def _named(content, names):
  """Yields the places that code names, in its module and in those of the user's."""
  contents = [content]
  for name in names:
    value = content.get(name)
    if inspect.ismodule(value) and not _is_of_library(value.__name__):
      contents.append(vars(value))
  for content in contents:
    yield from ((content, name) for name in names if name in content)


def _is_of_library(module):
  return _top_package(module) in _LIBRARIES


def _top_package(module):
  return str(module).partition('.')[0]


def _is_installed(function, package):
  """Returns whether a function is of Flax, JAX, or another installed package."""
  if _is_of_library(function.__module__):
    return True
  is_other = _top_package(function.__module__) != package
  return is_other and function.__code__.co_filename.startswith(_INSTALLED)


# The folders of packages that the user has not written, but maybe installed.
_INSTALLED = tuple(sysconfig.get_path(n) for n in ('stdlib', 'purelib', 'platlib'))


def _codes(code):
  yield code
  for constant in code.co_consts:
    if inspect.iscode(constant):
      yield from _codes(constant)


class TracedAttention(NamedTuple):
  """A call of a function of attention."""

  jaxpr: Any
  outputs: Any  # the structure of its outputs
  origins: list[Origin]
  layers: dict[str, Layer]  # of the products, whose paths are their names alone


def trace(
  function: Callable[..., Any], query: jax.Array, key: jax.Array, value: jax.Array
) -> TracedAttention:
  """Returns a traced call, and the products of activations in it that are searched."""
  jaxpr, shapes = jax.make_jaxpr(function, return_shape=True)(query, key, value)
  named = ((QK, key), (AV, value))
  parameters = (Parameters(a.size, (name,)) for name, a in named)
  origins = [None, *parameters]
  found = [p for p in parameter_products.find(jaxpr, origins) if p.is_open]
  sizes = {product.path: math.prod(product.layer.kernel_shape) for product in found}
  layers = {
    path[0]: layer._replace(operator=OPERATOR, kind=PAIR, params=0, kernels=0)
    for path, layer in parameter_products.layers(found, sizes).items()
  }
  return TracedAttention(jaxpr, jax.tree.structure(shapes), origins, layers)


def marked(
  query: jax.Array, key: jax.Array, value: jax.Array, layers: Mapping[str, Layer]
) -> jax.Array:
  """Returns the query, with a mark in the trace for each layer; only for tracing."""
  others = {QK: key, AV: value}
  for name, layer in layers.items():
    query = call_counts.marked(query, others[name], layer)
  return query


def compute(
  traced: TracedAttention,
  operands: tuple[jax.Array, jax.Array, jax.Array],
  formats: Mapping[str, LayerFormats],
  statistics: Mapping[str, PairStatistics],
  calibration: str = 'rms',
  **attributes: Any,
) -> tuple[Any, dict[str, PairStatistics]]:
  """Returns the outputs with quantized products, and the new statistics.

  The attention's weights are calibrated by their largest, since they are no normal
  data: most are near 0, and the few that count would be clipped.

  Args:
    traced: the call.
    operands: query, key and value.
    formats: of each product that is quantized.
    statistics: of each product that has moving averages.
    calibration: of all operands else.
    **attributes: of `quantized_pair_product`.
  """
  calibrations = {QK: (calibration, calibration), AV: ('absmax', calibration)}

  def quantized(state, path, product, x, w):
    (name,), given = path, state.get(path)
    y, updated = quantized_pair_product(
      product, x, w, formats[name], given, calibrations[name], **attributes
    )
    return y, state if given is None else {**state, path: updated}

  outputs, updated = product_evaluation.evaluate(
    traced.jaxpr.jaxpr,
    traced.jaxpr.consts,
    traced.origins,
    operands,
    frozenset((name,) for name in formats),
    quantized,
    {(name,): pair for name, pair in statistics.items()},
  )
  return traced.outputs.unflatten(outputs), {n: pair for (n,), pair in updated.items()}
