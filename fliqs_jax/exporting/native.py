"""Products of deployed layers: codes multiplied in their own type.

Integers are multiplied as integers, float8 of one type as such in dense layers, bf16 as
such. Operands of other or of differing formats and those in blocks are decoded to
float32, scales included. The values are those of `numerics.products` but for the order
of float32 operations.
"""

from collections.abc import Mapping

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from fliqs_jax.exporting import codes
from fliqs_jax.exporting.parameters import QuantizedLayer, unshift
from fliqs_jax.numerics.calibration import (
  Statistics,
  calibrate,
  of_activations,
  tensor_statistics,
)
from fliqs_jax.numerics.formats import find_format, get_format
from fliqs_jax.numerics.products import (
  LayerFormats,
  Product,
  activation_quantizer,
  against_output,
  fake_quantize,
)

# Types whose products XLA has on every platform, by itself or by a wider type.
_FLOAT8 = ('e4m3', 'e5m2')
_HALF_BYTE = 4

# Of one layer, or of all elements of a stack: what its program holds, by name.
Arrays = Mapping[str, jax.Array]


def deployed_layer(
  layer: QuantizedLayer,
  x: jax.Array,
  product: Product,
  element: jax.Array | None = None,
):
  """Returns what a layer computes from its codes, in the dtype of `x`.

  For layers that have no hook for their product these are its operands.

  Args:
    layer: its codes and scales.
    x: the layer's input.
    product: what the layer computes.
    element: int32[], of a stack of layers the one that computes.
  """
  arrays, kind = _at(_arrays(layer), element), arithmetic(layer)
  if kind == 'float32':
    return _decoded_product(layer, arrays, _decoded(layer, arrays), x, product)
  w = _unpacked(layer, arrays)
  if kind == 'bfloat16':
    y = product.function(x.astype(jnp.bfloat16), w, preferred_element_type=jnp.float32)
    return y.astype(x.dtype)
  x_codes, x_scale = _encoded(layer, arrays, x, product)
  if kind == 'integer':
    y = _integer_product(product, x_codes, w)
  else:
    y = product.function(x_codes, w, preferred_element_type=jnp.float32)
  scale = x_scale * arrays['weight_scale'].reshape(product.scale_shape)
  return (y.astype(jnp.float32) * scale).astype(x.dtype)


def decoded_layer(
  layer: QuantizedLayer,
  weights: jax.Array,
  x: jax.Array,
  product: Product,
  element: jax.Array | None = None,
):
  """Returns the same as `deployed_layer`, computed in float32 from decoded weights."""
  if element is not None:
    weights = weights.reshape(-1, *layer.layer.kernel_shape)
  arrays = _at(_arrays(layer) | {'decoded': weights}, element)
  return _decoded_product(layer, arrays, arrays['decoded'], x, product)


def _decoded_product(layer, arrays, weights, x, product):
  x_values = _rounded(layer, arrays, x, product)
  if product.kind in ('einsum', 'conv_transpose'):
    return x_values.astype(x.dtype), weights.astype(x.dtype)
  y = product.function(x_values, weights, preferred_element_type=jnp.float32)
  return y.astype(x.dtype)


def arithmetic(layer: QuantizedLayer) -> str:
  """Returns `integer`, `float8`, `bfloat16` or `float32`: how a layer multiplies."""
  weights, activations = find_format(layer.weights), find_format(layer.activations)
  if layer.layer.kind not in ('conv', 'dense') or weights.block or activations.block:
    return 'float32'
  if weights.name == activations.name == 'bf16':
    return 'bfloat16'
  # Before anything was seen of the input, its own scale cannot be trusted.
  if layer.activation_scale is None and not _sets_its_scale(layer):
    return 'float32'
  if weights.family == activations.family == 'int':
    return 'integer'
  same = weights.name == activations.name and weights.name in _FLOAT8
  return 'float8' if same and layer.layer.kind == 'dense' else 'float32'


def _sets_its_scale(layer):
  return layer.statistics is None or layer.shared_scale == 'token'


def _integer_product(product, x, w):
  if product.kind == 'dense':
    return product.function(x, w, preferred_element_type=jnp.int32)
  # cuDNN has few convolutions of int8, so that there float32 multiplies the codes,
  # which is exact as long as sums stay below 2²⁴.
  in_float32 = lambda x, w: product.function(
    x.astype(jnp.float32), w.astype(jnp.float32), preferred_element_type=jnp.float32
  )
  as_integers = lambda x, w: product.function(
    x, w, preferred_element_type=jnp.int32
  ).astype(jnp.float32)
  return lax.platform_dependent(x, w, cuda=in_float32, default=as_integers)


def _arrays(layer) -> dict[str, np.ndarray]:
  """Returns what a program holds of a layer, in the order of a stack's layers."""
  arrays = {'codes': _stored(layer), 'weight_scale': layer.weight_scale}
  if layer.block_scale is not None:
    arrays['block_scale'] = layer.block_scale
  if layer.activation_scale is not None:
    arrays['activation_scale'] = layer.activation_scale
  if layer.statistics is not None:
    arrays |= layer.statistics._asdict()
  if not layer.stack:
    return arrays
  axes = len(layer.stack)
  return {name: a.reshape(-1, *a.shape[axes:]) for name, a in arrays.items()}


def _at(arrays, element):
  """Returns what belongs to one element of a stack."""
  arrays = jax.tree.map(jnp.asarray, arrays)
  if element is None:
    return arrays
  return {name: array[element] for name, array in arrays.items()}


def _encoded(layer, arrays, x, product):
  """Returns the codes of a layer's input, int8 or float8, and their scale."""
  format = find_format(layer.activations)
  if layer.activation_scale is not None:
    scale = output_scale = arrays['activation_scale']
  else:
    scale = own_scale(layer, x, product)
    output_scale = against_output(scale, product.x_kept, len(product.scale_shape))
  x = x.astype(jnp.float32) * (1 / scale)
  if format.family == 'int':
    x = jnp.clip(jnp.round(x), -format.largest, format.largest).astype(jnp.int8)
    return x, output_scale
  # A cast to float8 does not saturate.
  x = jnp.clip(x, -format.largest, format.largest)
  return x.astype(codes.dtype_of(format.name)), output_scale


def own_scale(layer: QuantizedLayer, x: jax.Array, product: Product) -> jax.Array:
  """Returns the scale that a layer's input sets itself, or those of its tokens.

  Args:
    layer: whose `activation_scale` is None.
    x: its input.
    product: what it computes.
  """
  axes = None
  if layer.shared_scale == 'token':
    axes = tuple(axis for axis in range(x.ndim) if axis not in product.x_kept)
  statistics = tensor_statistics(x, axes)
  calibration = of_activations(layer.calibration)
  # That of zeros is 1.
  quantizer = calibrate(get_format(layer.activations), *statistics, calibration)
  return quantizer.scale / unshift(layer.activations, quantizer)


def _rounded(layer, arrays, x, product):
  """Returns the rounded input of a layer, scales included, float32."""
  if layer.activations == 'float32':
    return x.astype(jnp.float32)
  return fake_quantize(x, _quantizer(layer, arrays, x, product))


def _quantizer(layer, arrays, x, product):
  statistics = None
  if layer.statistics is not None:
    statistics = Statistics(*(arrays[name] for name in Statistics._fields))
  return activation_quantizer(
    product,
    x,
    jax.ShapeDtypeStruct(layer.layer.kernel_shape, jnp.float32),
    LayerFormats(None, get_format(layer.activations)),
    statistics,
    calibration=layer.calibration,
    activation_scale=layer.shared_scale,
  )


def _decoded(layer, arrays):
  """Returns the weights of a layer, float32, from the bytes that are deployed."""
  values = _unpacked(layer, arrays).astype(jnp.float32)
  if find_format(layer.weights).family == 'unscaled':
    return values
  if layer.block_scale is not None:
    axis, size = layer.block_axis, find_format(layer.weights).block.size
    scales = jnp.repeat(arrays['block_scale'].astype(jnp.float32), size, axis)
    values *= lax.slice_in_dim(scales, 0, values.shape[axis], axis=axis % values.ndim)
  return values * arrays['weight_scale']


def _stored(layer):
  """Returns the codes of the weights as a program holds them, few bits packed."""
  format = find_format(layer.weights)
  if format.bits > _HALF_BYTE:
    if format.family != 'float' or _ml_name(format) in _FLOAT8:
      return layer.codes
    return codes.to_bits(layer.codes, format.name)
  elements = layer.codes.reshape(-1, *layer.layer.kernel_shape)
  packed = [_packed(element, format) for element in elements]
  return np.stack(packed).reshape(*layer.stack, -1)


def _unpacked(layer, arrays):
  """Returns the codes of the weights: int8, float8, or float32 for other floats."""
  format, stored = find_format(layer.weights), arrays['codes']
  if format.bits > _HALF_BYTE:
    if stored.dtype != jnp.uint8:
      return stored
    return jnp.asarray(codes.values_of(format.name))[stored]
  width = _width(format)
  if format.family == 'int':
    values = _signed_fields(lax.bitcast_convert_type(stored, jnp.int8), width)
  else:
    fields = jnp.stack([stored & 15, stored >> _HALF_BYTE], axis=-1)
    values = jnp.asarray(codes.values_of(format.name))[fields]
  shape = layer.layer.kernel_shape
  return values.ravel()[: int(np.prod(shape))].reshape(shape)


def _ml_name(format):
  return format.element or format.name


def _signed_fields(packed, width):
  """Returns the integers of `width` bits in int8, the lowest first, int8[..., F]."""
  above = np.arange(8 - width, -1, -width, dtype=np.int8)  # bits above each field
  at_the_top = lax.shift_left(*jnp.broadcast_arrays(packed[..., None], above))
  return lax.shift_right_arithmetic(at_the_top, jnp.int8(8 - width))


def _packed(values, format):
  width = _width(format)
  if format.family == 'int':
    bits = values.astype(np.int8).view(np.uint8)
  else:
    bits = codes.to_bits(values, format.name)
  return codes.pack(bits & (2**width - 1), width)


def _width(format):
  """Returns in how many bits codes of at most four are packed."""
  return 2 if format.bits == 2 else _HALF_BYTE
