"""Batch normalisation folded into the scales of the layer before it.

    y = s_x · s_w · (q_x ∗ q_w)
    γ · (y − μ) / √(σ² + ε) + β = g · y + b

is a layer with the scales `g · s_w`, and one addition. That is exact but for the order
of float32 operations, since the codes stay what they are. Layers whose weights have no
scales stay what they are too, and so does what follows them.

Found in the traced network, of whichever interface of Flax: layers are marked in it,
and whatever multiplies a layer's output, or is added to it, by constants of a channel
is folded.
"""

from collections import Counter
from collections.abc import Callable, Sequence
import functools
import math
from typing import Any, NamedTuple

import jax
from jax.extend import core
import jax.numpy as jnp
import numpy as np

from fliqs_jax.exporting import native
from fliqs_jax.exporting.deployment import Deployment, of_any_batch
from fliqs_jax.exporting.parameters import QuantizedLayer
from fliqs_jax.layers.product_evaluation import bind
from fliqs_jax.numerics.formats import find_format
from fliqs_jax.numerics.products import Product

MARK = 'deployed_layer'  # in the name of what stands for a layer

_SAME_SHAPE = ('add', 'convert_element_type', 'copy', 'div', 'integer_pow', 'mul',
               'neg', 'rsqrt', 'sqrt', 'square', 'stop_gradient', 'sub')  # fmt: skip
_RESHAPES = ('expand_dims', 'reshape', 'squeeze')
_INLINED = ('jit', 'pjit', 'checkpoint', 'remat2', 'custom_jvp_call', 'custom_vjp_call')


def output_scale(layer: QuantizedLayer, product: Product) -> np.ndarray | None:
  """Returns the scales of a layer's weights as they broadcast against its output.

  None where there are none, or too few, or those of a stack.
  """
  has_scale = find_format(layer.weights).family != 'unscaled'
  if not has_scale or layer.stack or not product.scale_shape:
    return None
  return np.broadcast_to(layer.weight_scale, _kept_shape(layer, product)).reshape(
    product.scale_shape
  )


def with_output_scale(
  layer: QuantizedLayer, product: Product, scale: Any
) -> QuantizedLayer:
  """Returns a layer with other scales, those of `output_scale`."""
  return layer._replace(weight_scale=scale.reshape(_kept_shape(layer, product)))


def _kept_shape(layer, product):
  return [
    1 if axis in product.contracted else length
    for axis, length in enumerate(layer.layer.kernel_shape)
  ]


def marked_layer(
  layer: QuantizedLayer,
  x: jax.Array,
  product: Product,
  element: jax.Array | None = None,
) -> Any:
  """Returns what `native.deployed_layer` does, by a call that `fold` finds."""
  scale = output_scale(layer, product)
  if scale is None:
    return native.deployed_layer(layer, x, product, element)

  def deployed_layer(x, scale):
    return native.deployed_layer(with_output_scale(layer, product, scale), x, product)

  return jax.jit(deployed_layer)(x, scale)


def network(
  deployment: Deployment,
  shapes: Sequence[jax.ShapeDtypeStruct],
  compute: Callable[..., Any],
) -> tuple[Callable[..., Any], dict[str, int]]:
  """Returns a network for a batch of any size, and what to report of it.

  Args:
    deployment: the network.
    shapes: of its inputs, symbolic.
    compute: what layers compute, marked where batch normalisation is to be folded.

  Raises:
    ConfigError: where it cannot be traced for a batch of any size.
  """
  function = functools.partial(deployment.deployed, compute=compute)
  function = of_any_batch(function, shapes)
  if not deployment.folds_batch_norm:
    return function, {}
  function, count = fold(function, shapes)
  return function, {'folded_batch_norms': count}


class _Fold(NamedTuple):
  """A layer and the equations that follow it, as the one layer that computes both."""

  scale: np.ndarray  # float32, in the place of the layer's
  offset: np.ndarray  # float32, added to its output
  last: Any  # the variable that it gives
  dropped: list[Any]  # these equations


def fold(
  function: Callable[..., Any], shapes: Sequence[jax.ShapeDtypeStruct]
) -> tuple[Callable[..., Any], int]:
  """Returns a function that computes the same with less, and how much was folded.

  Args:
    function: the network, whose layers carry `MARK` and have their scales as a second
      operand.
    shapes: of its inputs.
  """
  closed, outputs = jax.make_jaxpr(function, return_shape=True)(*shapes)
  structure = jax.tree.structure(outputs)
  flat = jax.make_jaxpr(lambda *args: _inlined(closed.jaxpr, closed.consts, args))(
    *shapes
  )
  folds = _Network(flat).folds()
  dropped = {id(equation) for found in folds.values() for equation in found.dropped}

  def folded(*inputs):
    values = dict(zip(flat.jaxpr.constvars, flat.consts))
    values |= zip(flat.jaxpr.invars, inputs)
    read = lambda a: a.val if isinstance(a, core.Literal) else values[a]
    for equation in flat.eqns:
      if id(equation) in dropped:
        continue
      given = list(map(read, equation.invars))
      if found := folds.get(id(equation)):
        (y,) = bind(flat.jaxpr, equation, [given[0], jnp.asarray(found.scale)])
        y = y.reshape(found.last.aval.shape)
        values[found.last] = y + jnp.asarray(found.offset) if found.offset.any() else y
      else:
        values |= zip(equation.outvars, bind(flat.jaxpr, equation, given))
    return jax.tree.unflatten(structure, map(read, flat.jaxpr.outvars))

  return folded, len(folds)


def _is_mark(equation):
  name = equation.primitive.name
  return MARK in (equation.params.get('name', '') if name in _INLINED else name)


def _inlined(jaxpr, consts, args):
  """Evaluates a jaxpr without the calls that have layers in them."""
  values = dict(zip(jaxpr.constvars, consts)) | dict(zip(jaxpr.invars, args))
  read = lambda a: a.val if isinstance(a, core.Literal) else values[a]
  for equation in jaxpr.eqns:
    given, inner = list(map(read, equation.invars)), _inner(equation)
    if inner is not None and _has_mark(inner):
      consts = getattr(inner, 'consts', ())
      results = _inlined(getattr(inner, 'jaxpr', inner), consts, given)
    else:
      results = bind(jaxpr, equation, given)
    values |= zip(equation.outvars, results)
  return list(map(read, jaxpr.outvars))


def _inner(equation):
  if equation.primitive.name not in _INLINED or _is_mark(equation):
    return None
  names = ('jaxpr', 'call_jaxpr', 'fun_jaxpr')
  return next((equation.params[n] for n in names if n in equation.params), None)


def _has_mark(jaxpr):
  return any(
    _is_mark(equation) or ((inner := _inner(equation)) and _has_mark(inner))
    for equation in jaxpr.eqns
  )


class _Network:
  """A traced network: who reads a value, and which values are constants.

  Constants are as small as they can be broadcast from.
  """

  def __init__(self, closed):
    self.equations = closed.eqns
    self.constants = dict(zip(closed.jaxpr.constvars, closed.consts))
    self.makers, self.readers, self.uses = {}, {}, Counter()
    for equation in closed.eqns:
      self.makers |= dict.fromkeys(equation.outvars, equation)
      for atom in equation.invars:
        if isinstance(atom, core.Var):
          self.readers[atom] = equation
          self.uses[atom] += 1
    self.uses.update(a for a in closed.jaxpr.outvars if isinstance(a, core.Var))

  def folds(self):
    """Returns what can be folded, by the identity of the layer's equation."""
    found = {
      id(equation): self._fold(equation)
      for equation in self.equations
      if _is_mark(equation) and len(equation.invars) == 2
    }
    return {key: fold for key, fold in found.items() if fold}

  def _fold(self, equation):
    """Returns what follows a layer as one scale and one offset; None if none does."""
    scale = self._constant(equation.invars[1])
    (last,) = equation.outvars
    if scale is None or last.aval.dtype != jnp.float32:
      return None
    channels = scale.shape[next((a for a, n in enumerate(scale.shape) if n > 1), -1) :]
    gain, offset = np.ones(channels), np.zeros(channels)
    # The offset of a bias alone would be an addition as before.
    best, dropped = None, []
    while self.uses[last] == 1 and last in self.readers:
      reader = self.readers[last]
      step = self._step(reader, last, channels)
      if step is None:
        break
      factor, addend = step
      gain, offset = gain * factor, offset * factor + addend
      dropped = [*dropped, reader]
      (last,) = reader.outvars
      if np.any(gain != 1):
        new_scale = (scale * gain).astype(np.float32)
        best = _Fold(new_scale, offset.astype(np.float32), last, dropped)
    return best

  def _step(self, equation, var, channels):
    """Returns by what an equation multiplies a value, and what it adds."""
    name = equation.primitive.name
    if len(equation.outvars) != 1 or equation.outvars[0].aval.dtype != jnp.float32:
      return None
    if name in _RESHAPES:
      shapes = var.aval.shape, equation.outvars[0].aval.shape
      kept = [shape[-len(channels) :] == channels for shape in shapes]
      return (1, 0) if all(kept) else None
    if name in ('convert_element_type', 'copy', 'neg', 'stop_gradient'):
      return (-1 if name == 'neg' else 1), 0
    if name not in ('add', 'div', 'mul', 'sub'):
      return None
    first = equation.invars[0] is var
    other = self._of_channels(equation.invars[1 if first else 0], channels)
    if other is None or (name == 'div' and not first):
      return None
    if name in ('mul', 'div'):
      return (other if name == 'mul' else 1 / other), 0
    if name == 'add' or not first:
      return (1 if name == 'add' else -1), other
    return 1, -other

  def _of_channels(self, atom, channels):
    """Returns a constant that is the same but for the channels; else None."""
    value = self._constant(atom)
    if value is None:
      return None
    leading = value.shape[: max(value.ndim - len(channels), 0)]
    if math.prod(leading) != 1:
      return None
    value = value.reshape(value.shape[len(leading) :]).astype(np.float64)
    return np.broadcast_to(value, channels)

  def _constant(self, atom):
    """Returns the value of what depends on no input; None of all else."""
    if isinstance(atom, core.Literal):
      return np.asarray(atom.val, atom.aval.dtype)
    if atom not in self.constants:
      maker = self.makers.get(atom)
      self.constants[atom] = maker and self._made(maker)
    value = self.constants[atom]
    return None if value is None else np.asarray(value)

  def _made(self, equation):
    name, output = equation.primitive.name, equation.outvars[0].aval
    if len(equation.outvars) != 1 or not equation.invars or _is_mark(equation):
      return None
    given = [self._constant(atom) for atom in equation.invars]
    if any(value is None for value in given):
      return None
    if name == 'broadcast_in_dim':
      kept = dict(zip(equation.params['broadcast_dimensions'], given[0].shape))
      return given[0].reshape([kept.get(axis, 1) for axis in range(output.ndim)])
    if name in _SAME_SHAPE:
      given = np.broadcast_arrays(*given)
    elif any(value.shape != a.aval.shape for value, a in zip(given, equation.invars)):
      return None
    params = equation.params
    return np.asarray(equation.primitive.bind(*map(jnp.asarray, given), **params))
