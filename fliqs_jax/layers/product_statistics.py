"""Moving averages of products by parameters, in the collection `quant_stats`."""

from collections.abc import Iterable, Mapping
from typing import Any

from flax import traverse_util
import jax.numpy as jnp

from fliqs_jax.layers.parameter_products import OPERATOR, ParameterProduct, Path
from fliqs_jax.layers.variables import QUANT_STATS
from fliqs_jax.numerics.calibration import Statistics


def with_zeros(
  variables: Any, found: Iterable[ParameterProduct], paths: Iterable[Path]
) -> Any:
  """Returns variables with zero statistics for products.

  Those in a scan have none: the tensor at hand sets its own threshold.

  Args:
    variables: by collection.
    found: all products of the network.
    paths: the parameters of those that are searched.
  """
  scanned = {product.path for product in found if product.in_scan}
  zeros = Statistics(jnp.zeros(()), jnp.zeros(()))
  return write(variables, {path: zeros for path in paths if path not in scanned})


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
