"""The hooks of NNX's layers, and what of a network's layers they make searched."""

from collections.abc import Mapping
import functools
from typing import Any

from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
import jax
import jax.numpy as jnp

from fliqs_jax.layers import attention
from fliqs_jax.layers.origins import Path
from fliqs_jax.layers.products import transposed_convolution_arguments
from fliqs_jax.nnx.operators import (
  QuantizedAttention,
  QuantizedConv,
  QuantizedConvTranspose,
  QuantizedDotGeneral,
  QuantizedEinsum,
  promote_all_but_kernel,
)

# Hooks of each layer, with what they hold where the user has set none.
_PROMOTE_DTYPE = {'promote_dtype': (promote_dtype,)}
_DEFAULTS = {
  nnx.Conv: {'conv_general_dilated': (jax.lax.conv_general_dilated,)},
  nnx.Linear: {'dot_general': (jax.lax.dot_general,)},
  nnx.LinearGeneral: {
    'dot_general': (None, jax.lax.dot_general),
    'dot_general_cls': (None,),
  },
  nnx.Einsum: {'einsum_op': (jnp.einsum,)},
  nnx.ConvTranspose: {},
}


def set_hooks(model: nnx.Module, attributes: Mapping[str, Any]) -> dict[Path, str]:
  """Gives the layers of a model their operators.

  Args:
    model: changed in place.
    attributes: of `QuantizedOperator`.

  Returns:
    The paths of Flax's layers, and why those stay as they are that do.
  """
  handled = {}
  # Listed first, since operators are modules too.
  for parts, layer in list(nnx.iter_modules(model)):
    path = '/'.join(map(str, parts))
    kind = next((kind for kind in _DEFAULTS if isinstance(layer, kind)), None)
    if kind is None:
      continue
    reason = _own_hook(layer, kind) or _unknown_stack(layer, kind) or ''
    handled[tuple(map(str, parts))] = reason
    if reason:
      continue
    stacked = _stacked_axes(layer, kind)
    for name, hook in _hooks(layer, kind, path, stacked, attributes).items():
      setattr(layer, name, hook)
  return handled


def hook_attention(model: nnx.Module, attributes: Mapping[str, Any]) -> None:
  """Quantizes the products inside the attention of a model, changed in place.

  Args:
    model: the model.
    attributes: of `QuantizedOperator`.
  """
  for parts, module in list(nnx.iter_modules(model)):
    path = '/'.join(map(str, parts))
    if isinstance(module, nnx.MultiHeadAttention):
      stacked = _stacked_axes(module.query, nnx.LinearGeneral)
      operator = QuantizedAttention(path, stacked=stacked, **attributes)
      operator.function = module.attention_fn
      module.attention_fn = nnx.data(operator)
    elif _computes_attention(module):
      stacked = next(
        (
          _stacked_axes(layer, kind)
          for _, layer in nnx.iter_modules(module)
          for kind in _DEFAULTS
          if isinstance(layer, kind)
        ),
        (),
      )
      operator = QuantizedAttention(path, stacked=stacked, **attributes)
      module.quantized_attention = nnx.data(operator)
      object.__setattr__(module, '__class__', _with_own_attention(type(module)))


def _computes_attention(module):
  """Returns whether a module of the user's calls a function of attention itself.

  One that it has as an attribute is hooked, in place.
  """
  kind, has_own = type(module), False
  if kind.__module__.startswith('flax.'):
    return False
  for name, value in list(vars(module).items()):
    if attention.is_attention(value):
      setattr(module, name, attention.hooked(value))
      has_own = True
  return has_own or attention.uses_of(kind).any


@functools.cache
def _with_own_attention(kind):
  """Returns a class whose calls let `quantized_attention` compute attention."""

  def call(self, *args, **kwargs):
    places = attention.uses_of(kind).places
    with self.quantized_attention.computes(), attention.hooked_in(places):
      return kind.__call__(self, *args, **kwargs)

  own = {
    '__call__': functools.wraps(kind.__call__)(call),
    '__module__': kind.__module__,
  }
  return type(kind)(kind.__name__, (kind,), own)


def _own_hook(layer, kind):
  for name, defaults in (_DEFAULTS[kind] | _PROMOTE_DTYPE).items():
    if getattr(layer, name) not in defaults:
      return f'it has a hook of its own, in {name}'
  return None


def _hooks(layer, kind, path, stacked, attributes):
  """Returns the attributes that quantize a layer."""
  name, operator = {
    nnx.Conv: ('conv_general_dilated', QuantizedConv),
    nnx.Linear: ('dot_general', QuantizedDotGeneral),
    nnx.LinearGeneral: ('dot_general', QuantizedDotGeneral),
    nnx.Einsum: ('einsum_op', QuantizedEinsum),
    nnx.ConvTranspose: ('promote_dtype', QuantizedConvTranspose),
  }[kind]
  attributes = {**attributes, 'path': path, 'name': name, 'stacked': stacked}
  if kind is nnx.ConvTranspose:
    attributes['arguments'] = transposed_convolution_arguments(layer)
  hooks = {name: nnx.data(operator(**attributes))}
  # The other hooks are products, before which the kernel keeps its precision.
  return {'promote_dtype': promote_all_but_kernel} | hooks


def _own_shape(layer, kind):
  """Returns the shape of one kernel, as the layer was made."""
  if kind is nnx.Linear:
    return layer.in_features, layer.out_features
  if kind is nnx.LinearGeneral:
    batch = tuple(layer.batch_axis.values())
    return (*batch, *layer.in_features, *layer.out_features)
  return tuple(layer.kernel_shape)


def _stacked_axes(layer, kind):
  shape = layer.kernel.shape
  return shape[: len(shape) - len(_own_shape(layer, kind))]


def _unknown_stack(layer, kind):
  shape, own = layer.kernel.shape, _own_shape(layer, kind)
  if shape[len(shape) - len(own) :] != own:
    return (
      f'its kernel {shape} is none of {own} stacked along leading axes: stack with '
      'in_axes=0'
    )
  return None
