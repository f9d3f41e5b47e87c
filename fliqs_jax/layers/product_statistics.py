"""Moving averages of products by parameters, in the collection `quant_stats`."""

from collections.abc import Iterable, Mapping
from typing import Any

from flax import traverse_util
import jax.numpy as jnp

from fliqs_jax.layers.origins import Path
from fliqs_jax.layers.parameter_products import OPERATOR, ParameterProduct
from fliqs_jax.layers.variables import QUANT_STATS
from fliqs_jax.numerics.calibration import Statistics


def with_zeros(
  variables: Any, found: Iterable[ParameterProduct], paths: Iterable[Path]
) -> Any:
  """Returns variables with zero statistics for products.

  Where scans slice a parameter, each of its elements has some. A parameter in several
  products of which some are so has none: the tensor at hand sets its own threshold.

  Args:
    variables: by collection.
    found: all products of the network.
    paths: the parameters of those that are searched.
  """
  stacks: dict[Path, set[tuple[int, ...]]] = {path: set() for path in paths}
  for product in found:
    stacks.get(product.path, set()).add(product.stack)
  zeros = {
    path: Statistics(*[jnp.zeros(*shapes, jnp.float32)] * 2)
    for path, shapes in stacks.items()
    if len(shapes) == 1
  }
  return write(variables, zeros)


def read(variables: Mapping[str, Any]) -> dict[Path, Statistics]:
  """Returns the statistics of the products that have some, by parameter."""
  flat = traverse_util.flatten_dict(dict(variables.get(QUANT_STATS, {})))
  paths = {path[:-2] for path in flat if path[-2:-1] == (OPERATOR,)}
  return {
    path: Statistics(*(flat[*path, OPERATOR, name] for name in Statistics._fields))
    for path in sorted(paths)
  }


def write(variables: Any, statistics: Mapping[Path, Statistics]) -> Any:
  """Returns variables with new statistics of products."""
  if not statistics:
    return variables
  flat = traverse_util.flatten_dict(dict(variables.get(QUANT_STATS, {})))
  for path, values in statistics.items():
    flat |= {(*path, OPERATOR, n): value for n, value in values._asdict().items()}
  quant_stats = traverse_util.unflatten_dict(flat)
  return type(variables)({**variables, QUANT_STATS: quant_stats})
