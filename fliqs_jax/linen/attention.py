"""Products inside the attention of a linen network, searched as its layers are.

They are named by the module that calls the function of attention: `attention/qk` and
`attention/av`, and where it calls several, `attention/qk_1` and so on. Their statistics
lie in the collection `quant_stats` of that module.
"""

from collections.abc import Iterator, Mapping
import contextlib
import itertools
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from fliqs_jax.layers import attention
from fliqs_jax.layers.layer import join_path
from fliqs_jax.layers.origins import Path
from fliqs_jax.layers.variables import QUANT_STATS
from fliqs_jax.linen.method_interceptors import intercept_methods
from fliqs_jax.numerics.calibration import Statistics
from fliqs_jax.numerics.products import LayerFormats, PairStatistics


@contextlib.contextmanager
def searched_attention(
  formats: Mapping[Path, LayerFormats], attributes: Mapping[str, Any], marks: bool
) -> Iterator[None]:
  """Quantizes the products inside attention of networks that are called within it.

  Args:
    formats: of each product by its path; those that have none compute as they are.
    attributes: of `attention.compute`.
    marks: whether calls mark the products in their trace.
  """
  calls = []  # those of modules that are under way, each with its count of attentions

  def follow(call, args, kwargs, context):
    module = context.module
    inner = bool(calls) and calls[-1][0].path == module.path
    if inner and context.method_name != '__call__':  # one of its helpers
      return call(*args, **kwargs)
    calls.append((module, itertools.count()))
    try:
      with _hooked(module, context.method_name):
        return call(*args, **kwargs)
    finally:
      calls.pop()

  def handle(function, query, key, value):
    if not calls:
      return function(query, key, value)
    module, count = calls[-1]
    number = next(count)
    suffix = f'_{number}' if number else ''
    traced = attention.trace(function, query, key, value)
    paths = {name: (*module.path, name + suffix) for name in traced.layers}
    if marks:
      layers = {
        name: layer._replace(path=join_path(paths[name]))
        for name, layer in traced.layers.items()
      }
      query = attention.marked(query, key, value, layers)
    statistics = {
      name: found
      for name in traced.layers
      if (found := _statistics(module.scope, name + suffix))
    }
    bound = {name: formats[path] for name, path in paths.items() if path in formats}
    if not bound:
      with jax.named_scope(attention.SCOPE):
        return function(query, key, value)
    operands = query, key, value
    outputs, updated = attention.compute(
      traced, operands, bound, statistics, **attributes
    )
    if module.scope.is_mutable_collection(QUANT_STATS):
      for name, pair in updated.items():
        module.scope.put_variable(QUANT_STATS, name + suffix, _to_dict(pair))
    return outputs

  with intercept_methods(follow), attention.handled_by(handle):
    yield


@contextlib.contextmanager
def _hooked(module, method):
  """Hooks functions of attention that a module has as attributes or names itself."""
  held = {n: v for n, v in vars(module).items() if attention.is_attention(v)}
  if isinstance(module, nn.MultiHeadDotProductAttention) and method == '__call__':
    held['attention_fn'] = module.attention_fn  # any function
  # Modules are frozen, so that nobody changes them for good.
  for name, function in held.items():
    object.__setattr__(module, name, attention.hooked(function))
  try:
    with attention.hooked_in(attention.uses_of(type(module)).places):
      yield
  finally:
    for name, function in held.items():
      object.__setattr__(module, name, function)


def _statistics(scope, name):
  """Returns the moving averages of a product, zeros at first; None where none are."""
  if not scope.has_variable(QUANT_STATS, name):
    if not scope.is_mutable_collection(QUANT_STATS):
      return None
    nothing = Statistics(*[jnp.zeros((), jnp.float32)] * 2)
    scope.put_variable(QUANT_STATS, name, _to_dict(PairStatistics(nothing, nothing)))
  kept = scope.get_variable(QUANT_STATS, name)
  return PairStatistics(
    *(Statistics(**kept[field]) for field in PairStatistics._fields)
  )


def _to_dict(pair):
  return {field: operand._asdict() for field, operand in pair._asdict().items()}
