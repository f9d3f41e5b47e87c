"""Quantized operators for the hooks of NNX's own layers."""

from collections.abc import Callable
from typing import Any

from flax import nnx
from flax.nnx.nn.dtypes import canonicalize_dtype, promote_dtype
import jax
import jax.numpy as jnp

from fliqs_jax.layers import products
from fliqs_jax.numerics.calibration import Statistics
from fliqs_jax.numerics.products import LayerFormats, Product, quantized_layer


class QuantStat(nnx.Variable):
  """A moving average of the statistics of a layer's input."""


class QuantizedOperator(nnx.Module):
  """Quantizes the two operands of a product by the formats bound to its layer.

  Attributes:
    calibration: one of `calibration.CALIBRATIONS`.
    momentum: of the moving averages.
    formats: the layer's formats, set for the time of a call; None leaves it as it is.
    record: called as (x, w, product) before it computes, returns x; for discovery.
    updates: whether a call updates the moving averages.
  """

  def __init__(self, calibration: str = 'rms', momentum: float = 0.95):
    """The arguments are attributes."""
    self.calibration = calibration
    self.momentum = momentum
    self.updates = False
    self.formats: LayerFormats | None = nnx.data(None)
    self.record: Callable[..., jax.Array] | None = None
    for name in Statistics._fields:
      setattr(self, name, QuantStat(jnp.zeros(())))

  def compute(self, x: jax.Array, w: jax.Array, product: Product) -> jax.Array:
    """Returns the quantized product, and keeps its statistics.

    Args:
      x: activations in the compute dtype.
      w: weights in the parameters' own dtype.
      product: what the layer computes.
    """
    if self.record is not None:
      x = self.record(x, w, product)
    given = Statistics(*(getattr(self, name)[...] for name in Statistics._fields))
    y, updated = quantized_layer(
      product,
      x,
      w,
      self.formats,
      given,
      calibration=self.calibration,
      momentum=self.momentum,
    )
    if self.updates:
      for name, value in updated._asdict().items():
        getattr(self, name)[...] = value
    return y


class QuantizedConv(QuantizedOperator):
  """Quantized `lax.conv_general_dilated`, for `nnx.Conv.conv_general_dilated`."""

  def __call__(self, lhs, rhs, window_strides, padding, **kwargs):
    """The arguments are those of `lax.conv_general_dilated`."""
    # Linen's layer gives its precision always, and the others never.
    kwargs = _without_none(kwargs) | {'precision': kwargs.get('precision')}
    product = products.convolution(lhs, rhs, window_strides, padding, **kwargs)
    return self.compute(lhs, rhs, product)


class QuantizedDotGeneral(QuantizedOperator):
  """Quantized `lax.dot_general`, for `nnx.Linear` and `nnx.LinearGeneral`."""

  def __call__(self, lhs, rhs, dimension_numbers, precision=None, **kwargs):
    """The arguments are those of `lax.dot_general`."""
    if _without_none(kwargs):
      raise NotImplementedError(f'unexpected {sorted(_without_none(kwargs))}')
    product = products.dot_general(lhs, rhs, dimension_numbers, precision)
    return self.compute(lhs, rhs, product)


def promote_all_but_kernel(operands: Any, /, *, dtype: Any = None, **kwargs: Any):
  """NNX's `promote_dtype`, but the kernel keeps the parameters' precision."""
  inputs, kernel, bias = operands
  dtype = canonicalize_dtype(inputs, kernel, bias, dtype=dtype)
  inputs, bias = promote_dtype((inputs, bias), dtype=dtype, **kwargs)
  return inputs, kernel, bias


def _without_none(kwargs):
  return {name: value for name, value in kwargs.items() if value is not None}
