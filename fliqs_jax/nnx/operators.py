"""Quantized operators for the hooks of NNX's own layers.

Operators are modules among the layers of a network, so that Flax's transformations
carry their formats and statistics as they carry the layers' own variables.

`nnx.Einsum` and `nnx.ConvTranspose` multiply rounded operands, as their counterparts of
linen do.
"""

from collections.abc import Callable
import contextlib
import functools
from typing import Any

from flax import nnx
from flax.nnx.nn.dtypes import canonicalize_dtype, promote_dtype
import jax
import jax.numpy as jnp
import numpy as np

from fliqs_jax.layers import attention, products
from fliqs_jax.layers.call_counts import marked
from fliqs_jax.layers.layer import describe
from fliqs_jax.layers.replacement import observer, replacement
from fliqs_jax.numerics.calibration import Statistics
from fliqs_jax.numerics.products import (
  LayerFormats,
  PairStatistics,
  Product,
  quantized_layer,
  quantized_operands,
)


class QuantStat(nnx.Variable):
  """A moving average of the statistics of a layer's input."""


class BoundFormats(nnx.Variable):
  """The formats of a layer, a `LayerFormats`."""


class QuantizedOperator(nnx.Module):
  """Quantizes the two operands of a product by the formats bound to its layer.

  Keeps moving averages of the input's statistics, which a call updates in training, as
  `nnx.BatchNorm` does. Where a transformation carries no state of a layer, as
  `nnx.vmap` with `in_axes=None`, the input at hand sets its own threshold.

  Attributes:
    path: of the layer, `/`-separated.
    name: of the layer's attribute that holds the operator.
    stacked: leading axes of the layer's parameters, over which `nnx.scan` and
      `nnx.vmap` run; their elements share the formats.
    calibration: one of `calibration.LAYER_CALIBRATIONS`.
    momentum: of the moving averages.
    activation_scale: `tensor` or `token`: what shares a scale of the activations.
    use_running_average: whether a call leaves the moving averages as they are; Flax's
      `train` and `eval` set it.
    discovers: whether calls mark the layer in their trace.
    formats: None computes in floating point.
  """

  # What is computed: `quantized_layer`, or another function of the same arguments.
  arithmetic = staticmethod(quantized_layer)

  def __init__(
    self,
    path: str,
    name: str,
    stacked: tuple[int, ...] = (),
    calibration: str = 'rms',
    momentum: float = 0.95,
    activation_scale: str = 'tensor',
  ):
    """The arguments are attributes."""
    self.path = path
    self.name = name
    self.stacked = stacked
    self.calibration = calibration
    self.momentum = momentum
    self.activation_scale = activation_scale
    self.use_running_average = True
    self.discovers = False
    self.formats: BoundFormats | None = nnx.data(None)
    for name in Statistics._fields:
      setattr(self, name, QuantStat(jnp.zeros(stacked, jnp.float32)))

  def bind(self, formats: LayerFormats | None) -> None:
    """Sets the formats; None for floating point."""
    if formats is not None:
      stack = lambda a: jnp.broadcast_to(a, self.stacked + jnp.shape(a))
      formats = BoundFormats(jax.tree.map(stack, formats))
    self.formats = nnx.data(formats)

  def compute(self, x: jax.Array, w: jax.Array, product: Product) -> Any:
    """Returns what `arithmetic` makes of a product, and keeps its statistics.

    Args:
      x: activations in the compute dtype.
      w: weights in the parameters' own dtype.
      product: what the layer computes.
    """
    if compute := replacement():
      return compute(self.path, x, w, product)
    if observe := observer():
      observe(self.path, x, w, product)
    if self.discovers:
      layer = describe(self.path, self.name, product, x, w)
      kernels = int(np.prod(self.stacked))
      x = marked(x, w, layer._replace(kernels=kernels))
    y, updated = self.quantize(x, w, product, self._statistics(x))
    if updated is not None:
      self.keep(updated)
    return y

  def quantize(
    self, x: jax.Array, w: jax.Array, product: Product, statistics: Statistics | None
  ) -> tuple[Any, Statistics | None]:
    """Returns what `arithmetic` makes of a product, and the new statistics.

    Args:
      x: activations in the compute dtype.
      w: weights in the parameters' own dtype.
      product: what the layer computes.
      statistics: the moving averages; None lets the input set its own threshold.
    """
    return self.arithmetic(
      product,
      x,
      w,
      self.bound_formats,
      statistics,
      calibration=self.calibration,
      momentum=self.momentum,
      activation_scale=self.activation_scale,
    )

  def keep(self, statistics: Statistics) -> None:
    """Sets the moving averages, in training."""
    if not self.use_running_average:
      for name, value in statistics._asdict().items():
        getattr(self, name)[...] = value.astype(jnp.float32)

  @property
  def bound_formats(self) -> LayerFormats | None:
    """The formats of one element of a stack; None for floating point."""
    if self.formats is None:
      return None
    # The first of equal ones, where a transformation has not split them.
    first = lambda a: a if a.ndim == 0 else a.ravel()[0]
    return jax.tree.map(first, self.formats.get_value())

  def _statistics(self, x):
    values = [getattr(self, name)[...] for name in Statistics._fields]
    carried = all(value.ndim == 0 and _is_carried(value, x) for value in values)
    return Statistics(*values) if carried else None


class QuantizedPair(QuantizedOperator):
  """One product inside attention: its formats, and statistics of both operands.

  Those that `QuantizedOperator` has are of the first.

  Attributes:
    second_mean_square: as `mean_square`, of the second operand.
    second_absmax: as `absmax`, of the second operand.
  """

  def __init__(self, *args: Any, **kwargs: Any):
    """The arguments are those of `QuantizedOperator`."""
    super().__init__(*args, **kwargs)
    for name in Statistics._fields:
      setattr(self, f'second_{name}', QuantStat(jnp.zeros(self.stacked, jnp.float32)))

  def statistics(self, x: jax.Array) -> PairStatistics | None:
    """Returns the moving averages; None where a transformation does not carry them."""
    first = self._statistics(x)
    if first is None:
      return None
    second = (getattr(self, f'second_{name}')[...] for name in Statistics._fields)
    return PairStatistics(first, Statistics(*second))

  def keep(self, statistics: PairStatistics) -> None:
    """Sets the moving averages, in training."""
    if not self.use_running_average:
      for prefix, operand in zip(('', 'second_'), statistics):
        for name, value in operand._asdict().items():
          getattr(self, prefix + name)[...] = value.astype(jnp.float32)


class QuantizedAttention(nnx.Module):
  """The attention of a module, with quantized products.

  Of `nnx.MultiHeadAttention` it is the `attention_fn`. Other modules call functions of
  attention within `computes`; where they call several, these share the formats.

  Attributes:
    function: what computes attention otherwise, of an `attention_fn`.
    qk: the operator of the product of the key.
    av: that of the product of the value.
  """

  def __init__(self, path: str, **attributes: Any):
    """Makes the operators of the module at a path; attributes are an operator's."""
    self.function: Callable[..., Any] | None = None
    for name in (attention.QK, attention.AV):
      own = f'{path}/{name}'.lstrip('/')
      setattr(self, name, QuantizedPair(own, attention.OPERATOR, **attributes))

  def __call__(self, query, key, value, **kwargs):
    """The arguments are those of `nnx.dot_product_attention`."""
    with self.computes():
      return attention.hooked(self.function)(query, key, value, **kwargs)

  def computes(self) -> contextlib.AbstractContextManager[None]:
    """Returns the context in which it computes all attention."""
    return attention.handled_by(self._compute)

  def _compute(self, function, query, key, value):
    traced = attention.trace(function, query, key, value)
    operators = {name: getattr(self, name) for name in traced.layers}
    if any(operator.discovers for operator in operators.values()):
      layers = {
        name: layer._replace(path=operators[name].path)
        for name, layer in traced.layers.items()
      }
      query = attention.marked(query, key, value, layers)
    formats = {
      name: found
      for name, operator in operators.items()
      if (found := operator.bound_formats)
    }
    if not formats:
      with jax.named_scope(attention.SCOPE):
        return function(query, key, value)
    statistics = {
      name: found
      for name, operator in operators.items()
      if (found := operator.statistics(query))
    }
    outputs, updated = attention.compute(
      traced,
      (query, key, value),
      formats,
      statistics,
      calibration=self.qk.calibration,
      momentum=self.qk.momentum,
      activation_scale=self.qk.activation_scale,
    )
    for name, pair in updated.items():
      operators[name].keep(pair)
    return outputs


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
    # Linen's layers give no empty tuples of another type.
    (lhs_contracted, rhs_contracted), batch = dimension_numbers
    dimension_numbers = (tuple(lhs_contracted), tuple(rhs_contracted)), batch
    product = products.dot_general(lhs, rhs, dimension_numbers, precision)
    return self.compute(lhs, rhs, product)


class QuantizedEinsum(QuantizedOperator):
  """`jnp.einsum` of rounded operands, for `nnx.Einsum.einsum_op`."""

  arithmetic = staticmethod(quantized_operands)

  def __call__(self, equation, x, w, **kwargs):
    """The arguments are those of `jnp.einsum`."""
    x, w = self.compute(x, w, products.einsum(x, w, equation))
    return jnp.einsum(equation, x, w, **_without_none(kwargs))


class QuantizedConvTranspose(QuantizedOperator):
  """Rounded operands of `nnx.ConvTranspose`, for its `promote_dtype`.

  Attributes:
    arguments: of `products.transposed_convolution`.
  """

  arithmetic = staticmethod(quantized_operands)

  def __init__(self, *args: Any, arguments: Any, **kwargs: Any):
    """The arguments are those of `QuantizedOperator`, and the attribute."""
    super().__init__(*args, **kwargs)
    self.arguments = tuple(sorted(arguments.items()))

  def __call__(self, operands, /, **kwargs):
    """The arguments are those of `promote_dtype`."""
    x, w, bias = promote_all_but_kernel(operands, **kwargs)
    product = products.transposed_convolution(w, **dict(self.arguments))
    return *self.compute(x, w, product), bias


def _is_carried(state, x):
  """Returns whether the transformation that runs a layer gives its state back.

  State that it broadcasts comes from outside of its trace.
  """
  mapped, traced = _tracer_types()
  if isinstance(state, mapped) or isinstance(x, mapped):
    return isinstance(state, mapped)
  if isinstance(x, traced) and isinstance(state, traced):
    # JAX tells in no public way which trace a value is of.
    return state._trace is x._trace
  return not (isinstance(x, traced) and isinstance(state, jax.core.Tracer))


@functools.cache
def _tracer_types():
  """Returns the types of what `vmap` maps and of what is traced, as in `scan`."""
  found = []

  def record(x):
    found.append(type(x))
    return x

  x = jax.ShapeDtypeStruct((1,), jnp.float32)
  jax.eval_shape(jax.vmap(record), x)
  jax.eval_shape(record, x)
  return found


def promote_all_but_kernel(operands: Any, /, *, dtype: Any = None, **kwargs: Any):
  """NNX's `promote_dtype`, but the kernel keeps the parameters' precision."""
  inputs, kernel, bias = operands
  dtype = canonicalize_dtype(inputs, kernel, bias, dtype=dtype)
  inputs, bias = promote_dtype((inputs, bias), dtype=dtype, **kwargs)
  return inputs, kernel, bias


def _without_none(kwargs):
  return {name: value for name, value in kwargs.items() if value is not None}
