"""Products of a linen network's parameters that go through no layer of Flax.

They are layers as well, named by the path of their parameter. A network is traced with
its other layers quantized, and its jaxpr evaluated with these products quantized too.
Their statistics lie in the collection `quant_stats`, beside those of the others.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flax.core.scope import in_filter
import jax

from fliqs_jax.layers import product_evaluation, product_statistics
from fliqs_jax.layers.array_leaves import flatten, is_array
from fliqs_jax.layers.origins import CONSTANT, Origin, Parameters, Path
from fliqs_jax.layers.replacement import observed_in_trace, replacement
from fliqs_jax.layers.variables import QUANT_STATS
from fliqs_jax.numerics.products import LayerFormats, quantized_layer

Variables = Mapping[str, Any]

# Collections that follow from no input of the call.
_CONSTANT_COLLECTIONS = ('batch_stats',)


def trace(
  function: Callable[..., Any],
  variables: Variables,
  args: Sequence[Any],
  kwargs: Mapping[str, Any],
) -> tuple[Any, list[Origin]]:
  """Returns the jaxpr of a network's call, and the origins of its arguments.

  Args:
    function: the network's `apply`.
    variables: of the network, of which shapes alone are read, as of the arguments.
    args: of its call.
    kwargs: of its call. Random streams and mutable collections are added.
  """
  mutable = [name for name in variables if name != 'params']

  def apply(variables, *args, **kwargs):
    rngs = {'params': jax.random.key(0)}  # to which all others fall back
    return function(variables, *args, mutable=mutable, rngs=rngs, **kwargs)

  jaxpr, origins, _ = _trace(apply, *jax.tree.map(_shape, (variables, args, kwargs)))
  return jaxpr, origins


def weights(
  function: Callable[..., Any],
  variables: Variables,
  args: Sequence[Any],
  kwargs: Mapping[str, Any],
) -> dict[Path, list[jax.Array | None]]:
  """Returns what products of parameters multiply by, each call of one.

  The arguments are those of `find`, and the results those of
  `product_evaluation.weights`.
  """
  jaxpr, origins, _ = _trace(function, variables, args, kwargs)
  arrays, _ = flatten((variables, args, kwargs))
  known = [None if origin is None else array for origin, array in zip(origins, arrays)]
  return product_evaluation.weights(jaxpr.jaxpr, jaxpr.consts, origins, known)


def _shape(leaf):
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if is_array(leaf) else leaf


def _trace(function, variables, args, kwargs):
  """Returns the jaxpr of a call, its arguments' origins, and what rebuilds the outputs.

  The arguments of the jaxpr are the arrays among the leaves of the three, in order, and
  its results those in the outputs and what layers show to an observer.
  """
  arrays, rebuild_arguments = flatten((variables, args, kwargs))
  ends = []

  def on_arrays(*arrays):
    variables, args, kwargs = rebuild_arguments(arrays)
    with observed_in_trace() as observed:
      outputs = function(variables, *args, **kwargs)
    results, rebuild = flatten((outputs, observed.arrays))
    ends.append((rebuild, observed))
    return results

  def rebuild_outputs(results):
    rebuild, observed = ends[-1]
    outputs, shown = rebuild(results)
    observed.show(shown)
    return outputs

  jaxpr = jax.make_jaxpr(on_arrays)(*arrays)
  origins = [
    _origin(path, leaf)
    for path, leaf in jax.tree.leaves_with_path(variables)
    if is_array(leaf)
  ]
  others = len(arrays) - len(origins)
  return jaxpr, [*origins, *[None] * others], rebuild_outputs


def _origin(path, leaf):
  collection, *names = (getattr(key, 'key', None) for key in path)
  if collection == 'params':
    # Boxes of `nn.with_partitioning` add a step of their own.
    return Parameters(leaf.size, tuple(str(n) for n in names if n is not None))
  return CONSTANT if collection in _CONSTANT_COLLECTIONS else None


def apply(
  function: Callable[..., Any],
  formats: Mapping[Path, LayerFormats],
  attributes: Mapping[str, Any],
  variables: Variables,
  args: Sequence[Any],
  kwargs: Mapping[str, Any],
) -> Any:
  """Returns what a network's `apply` returns, with products of parameters quantized.

  Args:
    function: the network's `apply`.
    formats: of each parameter.
    attributes: of `QuantizedOperator`.
    variables: of the network.
    args: of its call.
    kwargs: of its call.
  """
  statistics = product_statistics.read(variables)

  def compute(state, path, product, x, w):
    if replaced := replacement():
      return replaced('/'.join(path), x, w, product), state
    given = state.get(path)
    y, updated = quantized_layer(product, x, w, formats[path], given, **attributes)
    return y, state if given is None else {**state, path: updated}

  jaxpr, origins, rebuild = _trace(function, variables, args, kwargs)
  arrays, _ = flatten((variables, args, kwargs))
  results, statistics = product_evaluation.evaluate(
    jaxpr.jaxpr,
    jaxpr.consts,
    origins,
    arrays,
    frozenset(formats),
    compute,
    statistics,
  )
  outputs = rebuild(results)
  mutable = kwargs.get('mutable', False)
  if mutable is False or not in_filter(mutable, QUANT_STATS) or not statistics:
    return outputs
  outputs, updated = outputs
  return outputs, product_statistics.write(updated, statistics)
