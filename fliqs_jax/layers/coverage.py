"""Coverage of a network: which of its layers are searched, and why others are not."""

from collections.abc import Mapping
from typing import NamedTuple

from fliqs_jax.layers.layer import Layer


class Coverage(NamedTuple):
  """The layers of a network that are searched, and why the others are not."""

  layers: tuple[Layer, ...]
  skipped: Mapping[str, str]  # module path -> why its parameters are not searched

  def __str__(self) -> str:
    found = [
      f'{layer.path or "."}: {layer.kind} {layer.kernel_shape}, {layer.macs:,} MACs'
      for layer in self.layers
    ]
    return '\n'.join(
      [
        f'{len(found)} layers are searched:',
        *found,
        *(f'not searched: {path or "."}: {why}' for path, why in self.skipped.items()),
      ]
    )
