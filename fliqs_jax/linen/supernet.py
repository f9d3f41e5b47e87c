"""Parts of linen networks whose architecture is searched: sized layers and gates."""

import functools
from typing import Any

from flax import linen as nn
import jax

from fliqs_jax.errors import ConfigError
from fliqs_jax.layers.architecture import Size, Table
from fliqs_jax.layers.variables import FORMATS, SIZES
from fliqs_jax.numerics.masking import LayerSizes


class Gate(nn.Module):
  """Lets a block's residual through where the block is present, else nothing."""

  present: Size

  @nn.compact
  def __call__(self, y: jax.Array) -> jax.Array:
    """Returns `y`, or zeros of its shape."""
    if not self.has_variable(FORMATS, SIZES):
      return y
    return y * self.get_variable(FORMATS, SIZES).astype(y.dtype)


def gated(y: jax.Array, present: Size) -> jax.Array:
  """Returns a residual, gated where it is open whether its block is present.

  Called in the compact method of the block, beside whose layers it is discovered.
  """
  return Gate(present, name='gate')(y) if isinstance(present, Table) else y


def tell_sizes(layer: Any, **sizes: Size) -> Any:
  """Returns a layer's class whose quantized operator is told what is decided of it.

  Args:
    layer: a partial of a linen layer, with the hooks of `operators`.
    **sizes: fields of `LayerSizes`.

  Raises:
    ConfigError: where sizes are to be searched and the layer has no hook.
  """
  if not any(isinstance(size, Table) for size in sizes.values()):
    return layer
  hooks = getattr(layer, 'keywords', {})
  for hook in ('conv_general_dilated_cls', 'dot_general_cls'):
    if hook in hooks:
      operator = functools.partial(hooks[hook], sizes=LayerSizes(**sizes))
      return functools.partial(layer, **{hook: operator})
  raise ConfigError('an architecture is searched with quantized layers alone')
