"""A user's own network, unchanged, with its layers searched.

    model = make_searchable(UsersNetwork())

The layers of Flax find their quantized operators by linen's method interceptors, which
set for the time of a call what `operators.conv_hooks` and `operators.dense_hooks` set
for good. Parameters keep their paths and values.
"""

from collections.abc import Mapping
import contextlib
import copy
import functools
from typing import Any

from flax import linen as nn
from flax import traverse_util
from flax.linen.dtypes import promote_dtype
import jax
import jax.numpy as jnp

from fliqs_jax.errors import ConfigError
from fliqs_jax.layers import parameter_products, product_statistics
from fliqs_jax.layers.coverage import Coverage, check_module, cover
from fliqs_jax.layers.origins import Path
from fliqs_jax.layers.products import transposed_convolution_arguments
from fliqs_jax.layers.variables import FORMATS
from fliqs_jax.linen import bare_products
from fliqs_jax.linen.attention import searched_attention
from fliqs_jax.linen.discovery import discover_hooked, init_shapes
from fliqs_jax.linen.method_interceptors import intercept_methods
from fliqs_jax.linen.operators import (
  QuantizedConv,
  QuantizedConvTranspose,
  QuantizedDotGeneral,
  QuantizedEinsum,
  QuantizedOperator,
  promote_all_but_kernel,
)


def make_searchable(
  model: nn.Module, attention_products: bool = False, **attributes: Any
) -> 'Searchable':
  """Returns a network like the given one whose layers are searched.

  Args:
    model: a linen module. Searched are its `nn.Conv`, `nn.ConvTranspose`, `nn.Dense`,
      `nn.DenseGeneral` (so the projections of attention) and `nn.Einsum`, and all other
      products of a parameter, by `lax.dot_general`, `jnp.einsum`, `@` or `attend` of
      `nn.Embed`; layers with a hook of their own stay as they are.
    attention_products: whether the products inside attention, QKᵀ and AV, are searched
      too: of `nn.MultiHeadDotProductAttention`, and of `dot_product_attention` of
      `flax.linen`, `flax.nnx` and `jax.nn`.
    **attributes: of `QuantizedOperator`: calibration, momentum, activation_scale.

  Raises:
    ConfigError: where the model is anything else, or quantized already.

  Examples:
    >>> from flax import linen as nn
    >>> import jax.numpy as jnp
    >>> from fliqs_jax.linen.interception import make_searchable
    >>> model = make_searchable(nn.Dense(4))
    >>> print(model.coverage(jnp.ones((1, 8))))
    1 layer is searched:
    .: dense (8, 4), 32 MACs
    100.0% of the multiply-accumulates by parameters are searched
  """
  if not isinstance(model, nn.Module | Searchable):
    found = f'the class {model.__name__}' if isinstance(model, type) else repr(model)
    raise ConfigError(
      'expected an instance of a linen or an NNX module, as Network() or '
      f'Network(rngs=nnx.Rngs(0)), found {found}'
    )
  if isinstance(model, Searchable):
    return model
  check_module(model, type(model).__name__)
  return Searchable(model, attributes, attention_products)


class Searchable:
  """The `init` and `apply` of a linen module, with its layers quantized.

  The variables are the module's own, and `quant_stats`; `apply` takes the formats in
  the collection `formats`, made by `variables.nest`, and without them is the module's.
  """

  def __init__(
    self,
    model: nn.Module,
    attributes: Mapping[str, Any],
    attention_products: bool = False,
  ):
    """See `make_searchable`."""
    self.model = model
    self._attributes = dict(attributes)
    self._attention_products = attention_products
    self._marks = False

  def __repr__(self) -> str:
    return f'Searchable({self.model!r})'

  def own_variables(self, *args: Any, **kwargs: Any) -> None:
    """Returns None: a linen module has no variables of its own, `init` makes them."""
    del args, kwargs

  def merge(self, variables: Mapping[str, Any]) -> 'Searchable':
    """Returns the network that computes with variables: itself, given them."""
    del variables
    return self

  def init(self, rngs: Any, *args: Any, **kwargs: Any) -> Any:
    """As `nn.Module.init`."""
    with self._hooked({}, {}):
      variables = self.model.init(rngs, *args, **kwargs)
    jaxpr, origins, handled = self._traced(variables, args, kwargs)
    found = parameter_products.find(jaxpr, origins)
    bare = _outside_of(found, handled, _params(variables))
    return product_statistics.with_zeros(variables, found, bare)

  def apply(self, variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
    """As `nn.Module.apply`."""
    variables = dict(variables)
    # Not a collection of the module's, since no transformation within it would know
    # how to carry it on; the values are closed over instead.
    bound = traverse_util.flatten_dict(variables.pop(FORMATS, {}))
    hooked, bare = {}, {}
    for (*path, operator, _), formats in bound.items():
      of_kind = bare if operator == parameter_products.OPERATOR else hooked
      of_kind[tuple(path)] = formats
    with self._hooked(hooked, {}):
      if not bare:
        return self.model.apply(variables, *args, **kwargs)
      return bare_products.apply(
        self.model.apply, bare, self._attributes, variables, args, kwargs
      )

  def coverage(self, *inputs: Any, **kwargs: Any) -> Coverage:
    """Returns which layers are searched, and why the others are not.

    Traces `init` and `apply` abstractly.

    Args:
      *inputs: one example in a batch of one, as arrays or `jax.ShapeDtypeStruct`.
      **kwargs: passed to `init` and `apply`.
    """
    variables = init_shapes(self, *inputs, **kwargs)
    hooked = {
      tuple(filter(None, layer.path.split('/'))): layer
      for layer in discover_hooked(self._marking(), variables, *inputs, **kwargs)
    }
    jaxpr, origins, handled = self._traced(variables, inputs, kwargs)
    found, params = parameter_products.find(jaxpr, origins), _params(variables)
    activations = ()
    if self._attention_products:
      activations = parameter_products.find_of_activations(jaxpr, origins)
    return cover(
      found=found,
      activations=activations,
      hooked=hooked,
      bare=_outside_of(found, handled, params),
      ndims={path: leaf.ndim for path, leaf in params.items()},
      handled=handled,
    )

  def product_weights(
    self, variables: Mapping[str, Any], *args: Any, **kwargs: Any
  ) -> dict[Path, list[jax.Array | None]]:
    """Returns what products of bare parameters multiply by, each call of one.

    Args:
      variables: of the network, arrays.
      *args: of its call, of which shapes alone are read.
      **kwargs: of its call.
    """
    with self._hooked({}, {}):
      return bare_products.weights(self.model.apply, variables, args, kwargs)

  def _marking(self):
    """Returns the same network, whose products inside attention leave marks."""
    marking = copy.copy(self)
    marking._marks = True
    return marking

  def _traced(self, variables, args, kwargs):
    """Returns a call's jaxpr, its arguments' origins, and the layers of Flax in it."""
    handled = {}
    with self._hooked({}, handled):
      traced = bare_products.trace(self.model.apply, variables, args, kwargs)
    return *traced, handled

  @contextlib.contextmanager
  def _hooked(self, formats, handled):
    hooks = functools.partial(_intercept, self._attributes, formats, handled)
    searched = contextlib.nullcontext()
    if self._attention_products:
      searched = searched_attention(formats, self._attributes, self._marks)
    with intercept_methods(hooks), searched:
      yield


def _params(variables):
  """Returns parameters by path."""
  return traverse_util.flatten_dict(nn.unbox(variables.get('params', {})))


def _outside_of(found, handled, params):
  """Returns the layers that are products of bare parameters."""
  sizes = {path: leaf.size for path, leaf in params.items()}
  return parameter_products.outside_of(found, handled, sizes)


def _intercept(attributes, formats, handled, call, args, kwargs, context):
  """Sets the hooks of a layer for the time of its call.

  Args:
    attributes: of its operator.
    formats: of each layer by its path.
    handled: gets the paths of Flax's layers, and why those are left alone that are.
    call: of the layer, or of any other module.
    args: its arguments.
    kwargs: those by name.
    context: of the call.
  """
  layer = context.module
  check_module(layer, '/'.join(layer.path) or type(layer).__name__)
  if context.method_name != '__call__':
    return call(*args, **kwargs)
  attributes = attributes | {'formats': formats.get(layer.path)}
  hooks = {}
  try:
    if isinstance(layer, _LAYERS):
      handled[layer.path] = ''
      _check_real(layer, args)
      hooks = _hooks(layer, attributes, args, kwargs)
  except _NotSearched as reason:
    handled[layer.path] = str(reason)
  with _replaced(layer, hooks):
    return call(*args, **kwargs)


@contextlib.contextmanager
def _replaced(layer, attributes):
  previous = {name: getattr(layer, name) for name in attributes}
  # Modules are frozen, so that nobody changes them for good.
  for name, value in attributes.items():
    object.__setattr__(layer, name, value)
  try:
    yield
  finally:
    for name, value in previous.items():
      object.__setattr__(layer, name, value)


class _NotSearched(Exception):
  """Why a layer stays as it is."""


_LAYERS = nn.Conv, nn.Dense, nn.DenseGeneral, nn.Einsum, nn.ConvTranspose


def _hooks(layer, attributes, args, kwargs):
  """Returns the attributes that quantize one of `_LAYERS`."""
  if isinstance(layer, nn.Conv):
    return _product_hooks(layer, 'conv_general_dilated', QuantizedConv, attributes)
  if isinstance(layer, (nn.Dense, nn.DenseGeneral)):
    return _product_hooks(layer, 'dot_general', QuantizedDotGeneral, attributes)
  if isinstance(layer, nn.Einsum):
    equation = [layer.einsum_str, *args[1:], *kwargs.values()][-1]
    return _operand_hooks(layer, QuantizedEinsum, attributes | {'equation': equation})
  return _operand_hooks(
    layer,
    QuantizedConvTranspose,
    attributes | transposed_convolution_arguments(layer),
  )


def _product_hooks(layer, name, operator, attributes):
  hook = getattr(layer, f'{name}_cls')
  if _makes_operators(hook):  # of the network's own, or set around a lifted layer
    return {f'{name}_cls': functools.partial(hook, formats=attributes['formats'])}
  for own, default in ((f'{name}_cls', None), (name, None), _PROMOTE_DTYPE):
    _check_default(layer, own, default)
  return {
    f'{name}_cls': functools.partial(operator, **attributes),
    'promote_dtype': promote_all_but_kernel,
  }


def _check_real(layer, inputs):
  dtypes = layer.param_dtype, layer.dtype, *map(jnp.result_type, inputs[:1])
  if any(dtype and jnp.issubdtype(dtype, jnp.complexfloating) for dtype in dtypes):
    raise _NotSearched('it computes with complex numbers, which no format has')


def _makes_operators(hook):
  kind = hook.func if isinstance(hook, functools.partial) else hook
  return isinstance(kind, type) and issubclass(kind, QuantizedOperator)


def _operand_hooks(layer, operator, attributes):
  if getattr(layer.promote_dtype, 'func', None) is _rounded_operands:
    return {}  # set around a lifted layer
  _check_default(layer, *_PROMOTE_DTYPE)
  operator = functools.partial(operator, **attributes)
  return {'promote_dtype': functools.partial(_rounded_operands, operator)}


_PROMOTE_DTYPE = 'promote_dtype', promote_dtype


def _check_default(layer, name, default):
  if getattr(layer, name) is not default:
    raise _NotSearched(f'it has a hook of its own, in {name}')


def _rounded_operands(operator, inputs, kernel, bias, *, dtype=None, inexact=True):
  """Flax's `promote_dtype`, with inputs and kernel rounded by an operator."""
  inputs, kernel, bias = promote_all_but_kernel(
    inputs, kernel, bias, dtype=dtype, inexact=inexact
  )
  return *operator()(inputs, kernel), bias
