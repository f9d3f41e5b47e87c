"""What a layer computes when it is deployed: products of codes in their own type.

Integers are multiplied as integers, float8 of one type as such in dense layers, bf16 as
such. Operands of other or of differing formats are decoded to float32, scales included.
The values are those of `numerics.products` but for the order of float32 operations.
"""

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from fliqs_jax.exporting import codes
from fliqs_jax.exporting.parameters import QuantizedLayer
from fliqs_jax.numerics.calibration import calibrate, of_activations, tensor_statistics
from fliqs_jax.numerics.formats import find_format, get_format
from fliqs_jax.numerics.products import Product, fake_quantize

# Types whose products XLA has on every platform, by itself or by a wider type.
_FLOAT8 = ('e4m3', 'e5m2')
_HALF_BYTE = 4


def deployed_layer(
  layer: QuantizedLayer, calibration: str, x: jax.Array, product: Product
):
  """Returns what a layer computes from its codes, in the dtype of `x`.

  For layers that have no hook for their product these are its operands.

  Args:
    layer: its codes and scales.
    calibration: of the search, for an input that sets its own scale.
    x: the layer's input.
    product: what the layer computes.
  """
  kind = arithmetic(layer)
  if kind == 'float32':
    return decoded_layer(layer, _decoded(layer), calibration, x, product)
  scale = layer.weight_scale.reshape(product.scale_shape)
  if kind == 'bfloat16':
    x_codes, w_codes = x.astype(jnp.bfloat16), jnp.asarray(layer.codes)
    y = product.function(x_codes, w_codes, preferred_element_type=jnp.float32)
    return y.astype(x.dtype)
  if kind == 'integer':
    y = _integer_product(product, _encoded(layer, x), _unpacked(layer))
  else:
    w_codes = jnp.asarray(layer.codes)
    y = product.function(
      _encoded(layer, x), w_codes, preferred_element_type=jnp.float32
    )
  return (y.astype(jnp.float32) * (layer.activation_scale * scale)).astype(x.dtype)


def decoded_layer(
  layer: QuantizedLayer,
  weights: jax.Array,
  calibration: str,
  x: jax.Array,
  product: Product,
):
  """Returns the same as `deployed_layer`, computed in float32 from decoded weights."""
  x_values = _rounded(layer, calibration, x)
  if product.kind in ('einsum', 'conv_transpose'):
    return x_values.astype(x.dtype), weights.astype(x.dtype)
  y = product.function(x_values, weights, preferred_element_type=jnp.float32)
  return y.astype(x.dtype)


def arithmetic(layer: QuantizedLayer) -> str:
  """Returns `integer`, `float8`, `bfloat16` or `float32`: how a layer multiplies."""
  weights, activations = find_format(layer.weights), find_format(layer.activations)
  if layer.layer.kind not in ('conv', 'dense') or layer.activation_scale is None:
    return 'float32'
  if weights.family == activations.family == 'int':
    return 'integer'
  if weights.name == activations.name == 'bf16':
    return 'bfloat16'
  same = weights.name == activations.name and weights.name in _FLOAT8
  return 'float8' if same and layer.layer.kind == 'dense' else 'float32'


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


def _encoded(layer, x):
  """Returns the codes of a layer's input, int8 or float8."""
  format = find_format(layer.activations)
  x = x.astype(jnp.float32) * (1 / layer.activation_scale)
  if format.family == 'int':
    return jnp.clip(jnp.round(x), -format.largest, format.largest).astype(jnp.int8)
  # A cast to float8 does not saturate.
  x = jnp.clip(x, -format.largest, format.largest)
  return x.astype(codes.dtype_of(format.name))


def _rounded(layer, calibration, x):
  """Returns the rounded input of a layer, scales included, float32."""
  statistics = layer.statistics
  if layer.activation_scale is None:
    statistics = tensor_statistics(x)
  elif layer.activations == 'float32':
    return x.astype(jnp.float32)
  quantizer = calibrate(
    get_format(layer.activations), *statistics, of_activations(calibration)
  )
  return fake_quantize(x, quantizer)


def _decoded(layer):
  """Returns the weights of a layer, float32, from the bytes that are deployed."""
  if find_format(layer.weights).family == 'unscaled':
    return jnp.asarray(layer.codes).astype(jnp.float32)
  return _unpacked(layer).astype(jnp.float32) * layer.weight_scale


def _unpacked(layer):
  """Returns the codes of the weights: int8, float8, or float32 for other floats."""
  format, shape = find_format(layer.weights), layer.codes.shape
  if format.bits > _HALF_BYTE:
    if format.family == 'int' or format.name in _FLOAT8:
      return jnp.asarray(layer.codes)
    bits = jnp.asarray(codes.to_bits(layer.codes, format.name))
    return jnp.asarray(codes.values_of(format.name))[bits]
  width = 2 if format.bits == 2 else _HALF_BYTE
  packed = jnp.asarray(_packed(layer, width))
  if format.family == 'int':
    values = _signed_fields(packed.view(jnp.int8), width)
  else:
    fields = jnp.stack([packed & 15, packed >> _HALF_BYTE], axis=-1)
    values = jnp.asarray(codes.values_of(format.name))[fields]
  return values.ravel()[: layer.codes.size].reshape(shape)


def _signed_fields(packed, width):
  """Returns the integers of `width` bits in int8, the lowest first, int8[..., F]."""
  above = np.arange(8 - width, -1, -width, dtype=np.int8)  # bits above each field
  at_the_top = lax.shift_left(*jnp.broadcast_arrays(packed[..., None], above))
  return lax.shift_right_arithmetic(at_the_top, jnp.int8(8 - width))


def _packed(layer, width):
  if find_format(layer.weights).family == 'int':
    bits = layer.codes.astype(np.int8).view(np.uint8)
  else:
    bits = codes.to_bits(layer.codes, layer.weights)
  return codes.pack(bits & (2**width - 1), width)
