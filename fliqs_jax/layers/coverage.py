"""Coverage of a network: which of its layers are searched, and why others are not."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from flax import nnx

from fliqs_jax.errors import ConfigError
from fliqs_jax.layers import attention
from fliqs_jax.layers.layer import Layer
from fliqs_jax.layers.origins import Path
from fliqs_jax.layers.parameter_products import ActivationProduct, ParameterProduct

_ENOUGH = 0.9  # of the multiply-accumulates
_NOT_MULTIPLIED = (
  'it is in no product that can be searched: its parameters are looked up, as by '
  'nn.Embed, used elementwise, or multiplied in a custom_vjp, a custom_jvp or a '
  'loop of unknown length'
)
_QWIX_MARK = '_unquantized_type'  # an attribute of the classes that Qwix makes


class Coverage(NamedTuple):
  """The layers of a network that are searched, and why the others are not."""

  layers: tuple[Layer, ...]
  skipped: Mapping[str, str]  # module path -> why its parameters are not searched
  # What part of all multiply-accumulates by parameters they have; None: not known.
  share: float | None = None
  notes: tuple[str, ...] = ()  # what else is to be known of the searched layers

  def __repr__(self) -> str:
    return str(self)

  def __str__(self) -> str:
    found = [
      f'{layer.path or "."}: {layer.kind} {layer.kernel_shape}, {layer.macs:,} MACs'
      for layer in self.layers
    ]
    count = '1 layer is' if len(found) == 1 else f'{len(found)} layers are'
    return '\n'.join([f'{count} searched:', *found, *self.remarks()])

  def remarks(self) -> list[str]:
    """Returns lines on the layers that are not searched, and on the searched share."""
    paths: dict[str, list[str]] = {}  # by what they have in common
    for path, why in self.skipped.items():
      paths.setdefault(why, []).append(path or '.')
    return [
      *self.notes,
      *(f'not searched: {", ".join(same)}: {why}' for why, same in paths.items()),
      *self._share_line(),
    ]

  def _share_line(self):
    if self.share is None:
      return []
    if self.share < _ENOUGH:
      return [
        f'WARNING: {1 - self.share:.1%} of the multiply-accumulates by parameters are '
        'NOT searched, and count in no cost: see above what is not, and why'
      ]
    return [f'{self.share:.1%} of the multiply-accumulates by parameters are searched']


def cover(
  found: Sequence[ParameterProduct],
  activations: Sequence[ActivationProduct],
  hooked: Mapping[Path, Layer],
  bare: Mapping[Path, Layer],
  ndims: Mapping[Path, int],
  handled: Mapping[Path, str],
) -> Coverage:
  """Returns the coverage of a network.

  Args:
    found: all products of its parameters.
    activations: those of activations, where these are searched too.
    hooked: the layers that have hooks, by module, and products inside attention.
    bare: those that are products of a parameter, by its path.
    ndims: of all parameters.
    handled: the modules of Flax that have hooks, and why those are left alone that are.
  """
  searched = {**bare, **hooked}
  layers, macs = {}, {True: 0, False: 0}
  for path, layer, *_ in found:
    own = path if path in searched else path[:-1]
    macs[own in searched] += layer.macs
    layers |= {own: searched[own]} if own in searched else {}
  total = sum(macs.values())
  return Coverage(
    layers=tuple({**layers, **hooked}.values() if bare else hooked.values()),
    skipped={
      **_skipped(found, set(searched), ndims, handled),
      **_skipped_activations(activations),
    },
    share=macs[True] / total if total else None,
  )


def _skipped(found, searched, ndims, handled):
  """Returns why parameters are not searched, by the paths of their modules."""
  skipped = {}
  # The parameters, each with those whose products it is a part of.
  multiplied = {product.path: {product.path} for product in found}
  for product in found:
    for part in product.others:
      multiplied.setdefault(part, set()).add(product.path)
  modules = searched | {path[:-1] for path in searched & set(multiplied)}
  for path, ndim in ndims.items():
    *module, name = path
    # Biases and scales are no layer alone, nor of two axes beside a product.
    is_factor = ndim > 1 and name not in ('bias', 'scale')
    is_one = path in multiplied or (is_factor and path[:-1] not in modules)
    wholes = multiplied.get(path, {path})
    if is_one and not searched & {*wholes, *(whole[:-1] for whole in wholes)}:
      # Parameters of the network itself, outside of its layers, have no other name.
      place = '/'.join(module) or ('' if () in handled else name)
      skipped[place] = handled.get(path[:-1]) or _NOT_MULTIPLIED
  return skipped


def _skipped_activations(found):
  """Returns why products of activations are not searched, by their place in the code.

  Those of attention that is searched are left out.
  """
  skipped = {}
  for product in found:
    if attention.SCOPE not in product.scopes:
      x, y = product.shapes
      skipped[product.place or 'a product'] = (
        f'it multiplies activations {x} by activations {y}, and not in '
        'dot_product_attention of jax.nn, flax.linen or flax.nnx, without sow_weights '
        'or module=, whose products alone are searched'
      )
  return skipped


def check_module(module: Any, place: str) -> None:
  """Checks that a module is neither quantized nor bridged to the other interface.

  Args:
    module: the module.
    place: its path, or the name of the network.

  Raises:
    ConfigError: where Qwix has quantized it, or it holds one of the other interface.
  """
  if hasattr(type(module), _QWIX_MARK):
    raise ConfigError(
      f'{place} is quantized already, by qwix: expected the network without it'
    )
  if isinstance(module, nnx.bridge.ToNNX | nnx.bridge.ToLinen):
    raise ConfigError(
      f'{place} is a module in nnx.bridge.{type(module).__name__}: expected a network '
      'of one interface, as the module within without the bridge'
    )
