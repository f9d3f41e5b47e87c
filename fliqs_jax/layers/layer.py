"""Layers of a network as a search knows them, whichever interface of Flax they have."""

from collections.abc import Iterable, Sequence
import json
import math
from typing import Any, NamedTuple

import jax

from fliqs_jax.errors import ConfigError
from fliqs_jax.numerics.blocks import Contraction
from fliqs_jax.numerics.masking import Axes, LayerSizes
from fliqs_jax.numerics.products import LayerFormats, Product

# The kind of a product of two activations: the second is in the place of the kernel.
PAIR = 'activations'


class Layer(NamedTuple):
  """Shapes, arguments and counts of one quantized layer, for one example."""

  path: str  # module path, `/`-separated
  operator: str  # name of the quantized operator within that module
  kind: str  # 'conv', 'dense', 'einsum', 'conv_transpose' or PAIR
  input_shape: tuple[int, ...]  # of one call, as the other shapes
  kernel_shape: tuple[int, ...]
  output_shape: tuple[int, ...]
  macs: int  # multiply-accumulates of all calls
  params: int  # parameters of the layer, its bias included
  arguments: tuple[tuple[str, Any], ...] = ()  # of the lax operation: strides, padding
  calls: int = 1  # in one forward pass: of a shared module, or in a scan
  # Of that shape: a scan over parameters has one an iteration, a pair has none.
  kernels: int = 1
  contraction: Contraction | None = None  # None where no format has blocks
  # Of a supernet's layer, whose shapes above are the largest:
  sizes: LayerSizes | None = None  # as tables, None where nothing is decided
  axes: Axes | None = None
  gate: str = ''  # module path of the gate that its output goes through, if any

  @property
  def contraction_length(self) -> int:
    """Values along the axis on which blocks lie, 0 where there is none."""
    if self.contraction is None:
      return 0
    return self.kernel_shape[self.contraction.w_axis]


class BoundLayer(NamedTuple):
  """Formats and sizes of one layer under some choices, as traced arrays."""

  formats: LayerFormats
  sizes: LayerSizes | None = None  # int32[] each; None where nothing is decided


def join_path(names: Iterable[Any]) -> str:
  """Returns the path of a module, its names separated by `/`.

  Raises:
    ConfigError: where a name has a `/` itself, and the path would be another's.
  """
  names = list(map(str, names))
  for name in names:
    if '/' in name:
      raise ConfigError(
        f'the network has a module named {name!r}: expected a name without "/", which '
        'separates the names of a path'
      )
  return '/'.join(names)


def describe(
  path: str, operator: str, product: Product, x: jax.Array, w: jax.Array
) -> Layer:
  """Returns the layer that computes a product once, without its parameters.

  Args:
    path: of its module.
    operator: name of the quantized operator within that module.
    product: what it computes.
    x: activations, of which only shape and dtype are read.
    w: weights, of which only the shape is read.
  """
  y = jax.eval_shape(product.function, x, jax.ShapeDtypeStruct(w.shape, x.dtype))
  if product.kind == 'conv_transpose':
    # Each input element meets each kernel element of its channel once.
    macs = x.size * w.size // x.shape[-1]
  else:
    macs = y.size * math.prod(w.shape[axis] for axis in product.contracted)
  return Layer(
    path=path,
    operator=operator,
    kind=product.kind,
    input_shape=x.shape,
    kernel_shape=w.shape,
    output_shape=y.shape,
    macs=macs,
    params=0,
    arguments=_hashable(tuple(sorted(product.function.keywords.items()))),
    contraction=product.contraction,
  )


def to_json(layers: Sequence[Layer]) -> list[dict[str, Any]]:
  """Returns layers whose sizes are decided, ready for JSON.

  Arguments that JSON has no type for are text. Contractions follow from the rest.
  """
  content = [layer._asdict() | {'arguments': dict(layer.arguments)} for layer in layers]
  for fields in content:
    del fields['contraction']
  return json.loads(json.dumps(content, default=str))


def _hashable(value):
  """Lists as tuples, within tuples too; named ones stay as they are."""
  if type(value) in (list, tuple):
    return tuple(map(_hashable, value))
  return value
