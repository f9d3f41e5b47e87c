"""Products of a linen network's parameters that go through no layer of Flax.

They are layers as well, named by the path of their parameter. A network is traced with
its other layers quantized, and its jaxpr evaluated with these products quantized too.
Their statistics lie in the collection `quant_stats`, beside those of the others.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
import itertools
import math
from typing import Any

from flax import traverse_util
from flax.core.scope import in_filter
import jax
import jax.numpy as jnp

from fliqs_jax.layers import parameter_products
from fliqs_jax.layers.parameter_products import CONSTANT, OPERATOR, Path
from fliqs_jax.layers.variables import QUANT_STATS
from fliqs_jax.numerics.calibration import Statistics
from fliqs_jax.numerics.products import LayerFormats, quantized_layer

Variables = Mapping[str, Any]
Found = tuple[parameter_products.ParameterProduct, ...]

# Collections that follow from no input of the call.
_CONSTANT_COLLECTIONS = ('batch_stats',)


def find(
  function: Callable[..., Any],
  variables: Variables,
  args: Sequence[Any],
  kwargs: Mapping[str, Any],
) -> Found:
  """Returns the products of a network's parameters, those within its layers too.

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
  return parameter_products.find(jaxpr, origins)


def _shape(leaf):
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if _is_array(leaf) else leaf


def _is_array(leaf):
  return hasattr(leaf, 'shape') and hasattr(leaf, 'dtype')


def _trace(function, variables, args, kwargs):
  """Returns the jaxpr of a call, its arguments' origins, and what rebuilds the outputs.

  The arguments of the jaxpr are the arrays among the leaves of the three, in order, and
  its results those in the outputs.
  """
  arrays, rebuild_arguments = _flatten((variables, args, kwargs))
  rebuild_outputs = []

  def on_arrays(*arrays):
    variables, args, kwargs = rebuild_arguments(arrays)
    outputs, rebuild = _flatten(function(variables, *args, **kwargs))
    rebuild_outputs.append(rebuild)
    return outputs

  jaxpr = jax.make_jaxpr(on_arrays)(*arrays)
  origins = [
    _origin(path, leaf)
    for path, leaf in jax.tree.leaves_with_path(variables)
    if _is_array(leaf)
  ]
  others = len(arrays) - len(origins)
  return jaxpr, [*origins, *[None] * others], rebuild_outputs[-1]


def _flatten(tree):
  """Returns the arrays of a tree, and the function from arrays to another such tree.

  Unlike `jax.tree.flatten` it leaves all else as it is, and opens dataclasses that JAX
  does not know.
  """
  leaves, structure = jax.tree.flatten(tree)
  arrays, parts = [], []  # a part: how many arrays it has, and what makes it of them
  for leaf in leaves:
    if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
      names = [field.name for field in dataclasses.fields(leaf) if field.init]
      inner, rebuild = _flatten({name: getattr(leaf, name) for name in names})
      arrays += inner
      make = lambda own, leaf=leaf, rebuild=rebuild: dataclasses.replace(
        leaf, **rebuild(own)
      )
      parts.append((len(inner), make))
    elif _is_array(leaf):
      arrays.append(leaf)
      parts.append((1, lambda own: own[0]))
    else:
      parts.append((0, lambda own, leaf=leaf: leaf))

  def rebuild(arrays):
    arrays = iter(arrays)
    return structure.unflatten(
      make(list(itertools.islice(arrays, count))) for count, make in parts
    )

  return arrays, rebuild


def _origin(path, leaf):
  collection, *names = (getattr(key, 'key', None) for key in path)
  if collection == 'params':
    # Boxes of `nn.with_partitioning` add a step of their own.
    return leaf.size, tuple(str(name) for name in names if name is not None)
  return CONSTANT if collection in _CONSTANT_COLLECTIONS else None


def outside_of(
  found: Found, modules: Iterable[Path], variables: Variables
) -> dict[Path, Any]:
  """Returns a layer for each product that can be searched outside of some modules.

  Args:
    found: from `find`.
    modules: the paths of layers of Flax, searched or left alone.
    variables: of the network.
  """
  modules = set(modules)
  bare = [
    product for product in found if product.is_open and product.path[:-1] not in modules
  ]
  leaves = jax.tree.leaves_with_path({'params': variables.get('params', {})})
  sizes = {_origin(*item)[1]: math.prod(item[1].shape) for item in leaves}
  return parameter_products.layers(bare, sizes)


def with_statistics(variables: Variables, found: Found, paths: Iterable[Path]) -> Any:
  """Returns variables with zero statistics for the products of parameters.

  Those in a scan have none: the tensor at hand sets its own threshold.
  """
  scanned = {product.path for product in found if product.in_scan}
  paths = [path for path in paths if path not in scanned]
  if not paths:
    return variables
  flat = traverse_util.flatten_dict(variables.get(QUANT_STATS, {}))
  for path in paths:
    flat |= {(*path, OPERATOR, name): jnp.zeros(()) for name in Statistics._fields}
  quant_stats = traverse_util.unflatten_dict(flat)
  return type(variables)({**variables, QUANT_STATS: quant_stats})


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
  statistics = _statistics(variables, formats)

  def compute(state, path, product, x, w):
    given = None if state is None else state.get(path)
    y, updated = quantized_layer(product, x, w, formats[path], given, **attributes)
    return y, state if given is None else {**state, path: updated}

  jaxpr, origins, rebuild = _trace(function, variables, args, kwargs)
  arrays, _ = _flatten((variables, args, kwargs))
  results, statistics = parameter_products.evaluate(
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
  flat = traverse_util.flatten_dict(updated.get(QUANT_STATS, {}))
  for path, values in statistics.items():
    flat |= {(*path, OPERATOR, n): value for n, value in values._asdict().items()}
  return outputs, {**updated, QUANT_STATS: traverse_util.unflatten_dict(flat)}


def _statistics(variables, paths):
  flat = traverse_util.flatten_dict(variables.get(QUANT_STATS, {}))
  return {
    path: Statistics(*(flat[*path, OPERATOR, name] for name in Statistics._fields))
    for path in paths
    if (*path, OPERATOR, Statistics._fields[0]) in flat
  }
