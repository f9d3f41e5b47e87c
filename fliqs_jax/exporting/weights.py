"""Weights that are no parameter of a layer of Flax: found in the traced network.

Products of bare parameters have such, transposed tables and joined kernels among them,
and so have layers whose kernel is computed from parameters, as `nn.WeightNorm` does.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from fliqs_jax.errors import ConfigError
from fliqs_jax.exporting.parameters import weights_name
from fliqs_jax.layers.layer import Layer
from fliqs_jax.layers.parameter_products import OPERATOR
from fliqs_jax.training.train_state import Arguments


def find(
  model: Any,
  layers: Sequence[Layer],
  variables: Mapping[str, Any],
  arguments: Arguments,
) -> dict[str, np.ndarray]:
  """Returns what layers multiply by where it is not their kernel, by path.

  Where scans slice a parameter, the weights of all elements, one after the other.

  Args:
    model: the network with quantized layers.
    layers: of the network.
    variables: of the network.
    arguments: of a call.

  Raises:
    ConfigError: where the weights of a product are not one array; a line for each.
  """
  if not hasattr(model, 'product_weights'):
    return {}

  def traced(variables):
    found = model.product_weights(variables, *arguments.args, **arguments.kwargs)
    return {'/'.join(path): calls for path, calls in found.items()}

  calls = traced(variables)
  bare = {layer.path: layer for layer in layers if layer.operator == OPERATOR}
  stacks = {
    path: stack
    for path, layer in bare.items()
    if (stack := np.shape(calls[path][0])[: -len(layer.kernel_shape)])
  }
  marked = traced(_with_numbers(variables, stacks)) if stacks else {}
  problems = []
  for path in bare:
    first, *others = calls[path]
    is_known = first is not None
    if path in stacks:  # whose elements tell by their weights which they are
      expected = numbers(stacks[path], np.shape(first))
      is_known = np.array_equal(marked[path][0], expected)
    if not is_known:
      problems.append(f'parameter {path!r} is multiplied in a loop')
    elif not all(np.array_equal(first, w) for w in others):
      problems.append(f'parameter {path!r} is multiplied in different parts')
  if problems:
    raise ConfigError(*(f'{p}: such a network cannot be exported' for p in problems))
  return {
    **{path: np.asarray(calls[path][0]) for path in bare},
    **_computed_kernels(layers, variables, calls),
  }


def _computed_kernels(layers, variables, calls):
  """Returns the kernels of layers of Flax that are computed from parameters."""
  params = traverse_util.flatten_dict(variables['params'], sep='/')
  computed = {}
  for layer in layers:
    name = weights_name(layer)
    kernel, (w, *others) = params.get(name), calls.get(name) or [None]
    if (
      layer.kind in ('conv', 'dense')
      and np.shape(w) == np.shape(kernel) != ()
      and not np.array_equal(w, kernel)
      and all(np.array_equal(w, other) for other in others)
    ):
      computed[layer.path] = np.asarray(w)
  return computed


def numbers(stack: tuple[int, ...], shape: Sequence[int]) -> jax.Array:
  """Returns the number of its element of a stack in each place of an array.

  Args:
    stack: the leading axes of the array.
    shape: of the array.
  """
  elements = jnp.arange(np.prod(stack, dtype=int)).reshape(stack)
  missing = tuple(range(len(stack), len(shape)))
  return jnp.broadcast_to(jnp.expand_dims(elements, missing), shape)


def _with_numbers(variables, stacks):
  """Returns variables whose parameters are the numbers of their elements.

  Args:
    variables: of the network.
    stacks: leading axes of these parameters; those that have others stay as they are.
  """

  def number(name, leaf):
    stack = stacks.get(name, ())
    if not stack or leaf.shape[: len(stack)] != stack:
      return leaf
    return numbers(stack, leaf.shape).astype(leaf.dtype)

  return {**variables, 'params': map_named(number, variables['params'])}


def map_named(function: Callable[[str, Any], Any], params: Any) -> Any:
  """Returns a tree of what a function makes of each leaf and its name, a path."""
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: function('/'.join(key.key for key in path), leaf), params
  )
