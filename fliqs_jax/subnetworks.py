"""The small network that a search of the architecture found, out of its supernet."""

from typing import Any

from flax import traverse_util
import jax


def slice_variables(variables: Any, shapes: Any) -> Any:
  """Returns the variables of a small network from those of its supernet.

  Channels are the first ones of the supernet's, convolution kernels the centre of
  theirs in space, as `architecture` has it. Layers that the small network lacks drop
  out. This is for networks that pool their features before a dense layer; flattened,
  they would have channels of another order.

  Args:
    variables: a tree of arrays.
    shapes: the small network's tree, of anything that has a shape.

  Raises:
    KeyError: where the supernet lacks a variable of the small network.
  """
  whole = traverse_util.flatten_dict(variables)
  return traverse_util.unflatten_dict({
      path: _slice(whole[path], small.shape, is_kernel=path[-1] == 'kernel')
      for path, small in traverse_util.flatten_dict(shapes).items()
  })  # fmt: skip


def _slice(array: jax.Array, shape: tuple[int, ...], is_kernel: bool) -> jax.Array:
  slices = []
  for axis, (whole, small) in enumerate(zip(array.shape, shape, strict=True)):
    # The last two axes of a kernel are its channels, the others are in space.
    in_space = is_kernel and axis < array.ndim - 2
    start = (whole - small) // 2 if in_space else 0
    slices.append(slice(start, start + small))
  return array[tuple(slices)]
