"""Coverage of a network: which of its layers are searched, and why others are not."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from fliqs_jax.errors import ConfigError
from fliqs_jax.layers.layer import Layer

_ENOUGH = 0.9  # of the multiply-accumulates
_QWIX_MARK = '_unquantized_type'  # an attribute of the classes that Qwix makes


class Coverage(NamedTuple):
  """The layers of a network that are searched, and why the others are not."""

  layers: tuple[Layer, ...]
  skipped: Mapping[str, str]  # module path -> why its parameters are not searched
  # What part of all multiply-accumulates by parameters they have; None: not known.
  share: float | None = None

  def __str__(self) -> str:
    found = [
      f'{layer.path or "."}: {layer.kind} {layer.kernel_shape}, {layer.macs:,} MACs'
      for layer in self.layers
    ]
    return '\n'.join(
      [
        f'{len(found)} layers are searched:',
        *found,
        *self.remarks(),
      ]
    )

  def remarks(self) -> list[str]:
    """Returns lines on the layers that are not searched, and on the searched share."""
    skipped = self.skipped.items()
    return [
      *(f'not searched: {path or "."}: {why}' for path, why in skipped),
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


def check_not_quantized(module: Any, place: str) -> None:
  """Checks that Qwix has not quantized a module of either interface.

  Args:
    module: the module.
    place: its path, or the name of the network.

  Raises:
    ConfigError: where it has.
  """
  if hasattr(type(module), _QWIX_MARK):
    raise ConfigError(
      f'{place} is quantized already, by qwix: expected the network without it'
    )
