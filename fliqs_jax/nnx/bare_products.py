"""Products of an NNX network's parameters that go through no layer of Flax.

They are layers as well, named by the path of their parameter, as those of linen. The
network carries an operator for each. Its call is traced, with its other layers
quantized, and the jaxpr evaluated with these products quantized too.
"""

from collections.abc import Iterator, Mapping
import contextvars
import copyreg
import functools
from typing import Any

from flax import nnx
import jax

from fliqs_jax.layers import product_evaluation
from fliqs_jax.layers.array_leaves import flatten
from fliqs_jax.layers.origins import CONSTANT, Origin, Parameters, Path
from fliqs_jax.layers.parameter_products import OPERATOR
from fliqs_jax.layers.replacement import observed_in_trace, replacement
from fliqs_jax.nnx.operators import QuantizedOperator, QuantStat
from fliqs_jax.numerics.calibration import Statistics
from fliqs_jax.numerics.products import LayerFormats

# The attribute of a network that has the operators, in dicts as its modules are.
ATTRIBUTE = 'quantized_products'
_is_traced = contextvars.ContextVar('is_traced', default=False)


class QuantizedProduct(QuantizedOperator):
  """The product of a parameter.

  Without statistics the input at hand sets its own threshold.
  """

  def __init__(self, path: Path, statistics: Statistics | None, **attributes: Any):
    """Makes the operator of a parameter.

    Args:
      path: of the parameter.
      statistics: the moving averages, or none.
      **attributes: of `QuantizedOperator`.
    """
    super().__init__('/'.join(path), OPERATOR, **attributes)
    self.parameter = path
    for name in Statistics._fields:
      known = QuantStat(getattr(statistics, name)) if statistics else None
      setattr(self, name, nnx.data(known))

  @property
  def statistics(self) -> Statistics | None:
    """The moving averages, if there are some."""
    if self.absmax is None:
      return None
    return Statistics(*(getattr(self, name)[...] for name in Statistics._fields))


def add_operators(
  model: nnx.Module,
  statistics: Mapping[Path, Statistics],
  formats: Mapping[Path, LayerFormats],
  attributes: Mapping[str, Any],
) -> None:
  """Lets a model compute with quantized products of its own parameters.

  Args:
    model: changed in place.
    statistics: of products by the path of their parameter.
    formats: of products; those that have none compute as they are.
    attributes: of `QuantizedOperator`.
  """
  products = nnx.Dict()
  for path in sorted({*statistics, *formats}):
    operator = QuantizedProduct(path, statistics.get(path), **attributes)
    operator.bind(formats.get(path))
    place = products
    for name in path:
      place = place.setdefault(name, nnx.Dict())
    place[OPERATOR] = operator
  setattr(model, ATTRIBUTE, nnx.data(products))
  object.__setattr__(model, '__class__', _with_own_products(type(model)))


@functools.cache
def _with_own_products(kind):
  """Returns a class whose calls quantize the products of its parameters."""

  def call(self, *args, **kwargs):
    operators = {
      operator.parameter: operator for operator in _operators(getattr(self, ATTRIBUTE))
    }
    bound = {path: op for path, op in operators.items() if op.bound_formats is not None}
    if not bound or _is_traced.get():
      return kind.__call__(self, *args, **kwargs)
    return _compute(self, kind.__call__, bound, args, kwargs)

  def reduce(self, protocol):
    # The class itself can be found in no module, as pickle would have it.
    _, _, *rest = kind.__reduce_ex__(self, protocol)
    return _unpickled, (kind,), *rest

  own = {
    '__call__': functools.wraps(kind.__call__)(call),
    '__module__': kind.__module__,
    '__reduce_ex__': reduce,
  }
  return type(kind)(kind.__name__, (kind,), own)


def _unpickled(kind):
  return copyreg.__newobj__(_with_own_products(kind))


def _operators(node) -> Iterator[QuantizedProduct]:
  for _, module in nnx.iter_modules(node):
    if isinstance(module, QuantizedProduct):
      yield module


def _compute(model, call, operators, args, kwargs):
  """Returns what a model's call returns, with products of parameters quantized.

  Args:
    model: the model, whose state the call may change.
    call: that of the class that it had.
    operators: of the products by the path of their parameter.
    args: of the call, modules and variables too.
    kwargs: of the call.
  """
  statistics = {
    path: found
    for path, operator in operators.items()
    if (found := operator.statistics) is not None
  }

  def compute(state, path, product, x, w):
    if replaced := replacement():
      return replaced('/'.join(path), x, w, product), state
    given = state.get(path)
    y, updated = operators[path].quantize(x, w, product, given)
    return y, state if given is None else {**state, path: updated}

  with nnx.update_context(ATTRIBUTE):
    jaxpr, origins, arrays, finish = _trace(model, call, args, kwargs)
    results, statistics = product_evaluation.evaluate(
      jaxpr.jaxpr,
      jaxpr.consts,
      origins,
      arrays,
      frozenset(operators),
      compute,
      statistics,
    )
    outputs = finish(results)
  for path, values in statistics.items():
    operators[path].keep(values)
  return outputs


def _trace(model, call, args, kwargs):
  """Returns a call's jaxpr, its arguments' origins, these, and what ends the call.

  That is a function from the jaxpr's results to the outputs, which also changes the
  model as the call does. It runs in the update context of the trace.
  """
  leaves, structure = jax.tree.flatten((args, kwargs), is_leaf=_has_state)
  places = [place for place, leaf in enumerate(leaves) if _has_state(leaf)]
  nodes = model, *(leaves[place] for place in places)
  leaves = [None if place in places else leaf for place, leaf in enumerate(leaves)]
  with nnx.split_context(ATTRIBUTE) as context:
    graph, *states = context.split(nodes, nnx.Param, nnx.BatchStat, ...)
  arrays, rebuild = flatten((*states, leaves))
  ends = []

  def on_arrays(*arrays):
    *states, leaves = rebuild(arrays)
    with nnx.merge_context(ATTRIBUTE, inner=True) as context:
      nodes = context.merge(graph, *states)
    for place, node in zip(places, nodes[1:]):
      leaves[place] = node
    args, kwargs = structure.unflatten(leaves)
    before = _content(nodes)
    with observed_in_trace() as observed:
      outputs = call(nodes[0], *args, **kwargs)
    changed = None
    # Else nothing is written, as to a model that a trace has closed over.
    if _content(nodes) != before:
      with nnx.split_context(ATTRIBUTE) as context:
        changed = context.split(nodes)
    results, rebuild_results = flatten((outputs, changed, observed.arrays))
    ends.append((rebuild_results, observed))
    return results

  token = _is_traced.set(True)
  try:
    jaxpr = jax.make_jaxpr(on_arrays)(*arrays)
  finally:
    _is_traced.reset(token)

  def finish(results):
    rebuild_results, observed = ends[-1]
    outputs, changed, shown = rebuild_results(results)
    observed.show(shown)
    if changed is not None:
      with nnx.merge_context(ATTRIBUTE, inner=False) as context:
        context.merge(*changed)
    return outputs

  return jaxpr, _origins(*states, len(arrays)), arrays, finish


def _origins(params, batch_stats, others, count) -> list[Origin]:
  """Returns the origins of a call's arrays, which begin with these states."""
  del others
  origins = [_origin(path, leaf) for path, leaf in jax.tree.leaves_with_path(params)]
  # They follow from no input of the call, as the norm of a kernel that is kept.
  origins += [CONSTANT] * len(jax.tree.leaves(batch_stats))
  return origins + [None] * (count - len(origins))


def _origin(path, leaf):
  node, *names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
  return Parameters(leaf.size, tuple(map(str, names))) if node == 0 else None


def _has_state(leaf):
  return isinstance(leaf, nnx.Pytree | nnx.Variable)


def _content(nodes):
  """Returns what tells whether nodes have changed: their graph, and which values."""
  graph, state = nnx.split(nodes)
  return graph, list(map(id, jax.tree.leaves(state)))
