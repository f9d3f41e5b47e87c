"""Arrays among the leaves of any tree, for functions that take arrays alone."""

from collections.abc import Callable, Sequence
import dataclasses
import itertools
from typing import Any

import jax


def is_array(leaf: Any) -> bool:
  """Returns whether a leaf is an array, or the shape of one."""
  return hasattr(leaf, 'shape') and hasattr(leaf, 'dtype')


def flatten(tree: Any) -> tuple[list[Any], Callable[[Sequence[Any]], Any]]:
  """Returns the arrays of a tree, and the function from arrays to another such tree.

  Unlike `jax.tree.flatten` it leaves all else as it is, and opens dataclasses that JAX
  does not know.
  """
  leaves, structure = jax.tree.flatten(tree)
  arrays, parts = [], []  # a part: how many arrays it has, and what makes it of them
  for leaf in leaves:
    if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
      names = [field.name for field in dataclasses.fields(leaf) if field.init]
      inner, rebuild = flatten({name: getattr(leaf, name) for name in names})
      arrays += inner
      make = lambda own, leaf=leaf, rebuild=rebuild: dataclasses.replace(
        leaf, **rebuild(own)
      )
      parts.append((len(inner), make))
    elif is_array(leaf):
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
