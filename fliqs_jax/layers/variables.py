"""Variable collections of quantized networks: their names, and formats put into one."""

from collections.abc import Mapping, Sequence
from typing import Any

from flax import traverse_util

from fliqs_jax.layers.layer import BoundLayer, Layer

FORMATS = 'formats'  # the collection in which a network finds what is decided
LAYER_FORMATS = 'layer'  # its variables, each a `LayerFormats`
SIZES = 'sizes'  # its variables, each a `LayerSizes` or, of a gate, one of its sizes
QUANT_STATS = 'quant_stats'  # the collection of activation statistics


def nest(layers: Sequence[Layer], bound: Mapping[str, BoundLayer]) -> dict[str, Any]:
  """Returns the collection `formats` in which the operators find theirs.

  Args:
    layers: from `discover`.
    bound: of each by its path, from `SearchSpace.bind`.
  """
  collection = {}
  for layer in layers:
    formats, sizes = bound[layer.path]
    operator = (*filter(None, layer.path.split('/')), layer.operator)
    collection[(*operator, LAYER_FORMATS)] = formats
    if sizes is not None:
      collection[(*operator, SIZES)] = sizes
      if layer.gate:
        collection[(*layer.gate.split('/'), SIZES)] = sizes.present
  return traverse_util.unflatten_dict(collection)
