"""Rules of what is computed of each element: (graph, equation, names) -> name.

Operands are broadcast by the operations themselves.
"""

from jax import lax
import numpy as np

from fliqs_jax.errors import ConfigError


def _simple(operation):
  return lambda graph, equation, names: graph.node(operation, names)


def _logical(operation):
  """An operation of truth values; of whole numbers it is one of their bits."""

  def convert(graph, equation, names):
    of_bits = '' if equation.outvars[0].aval.dtype == bool else 'Bitwise'
    return graph.node(f'{of_bits}{operation}', names)

  return convert


def _chain(*operations):
  def convert(graph, equation, names):
    for operation in operations:
      names = [graph.node(operation, names)]
    return names[0]

  return convert


def _float(graph, value):
  return graph.constant(np.float32(value))


def _integer_pow(graph, equation, names):
  return graph.node('Pow', [*names, _float(graph, equation.params['y'])])


def _square(graph, equation, names):
  return graph.node('Mul', names * 2)


def _cast(graph, equation, names):
  return graph.cast(names[0], equation.params['new_dtype'])


def _reduce_precision(graph, equation, names):
  params = equation.params
  if (params['exponent_bits'], params['mantissa_bits']) != (8, 7):
    raise ConfigError('the network rounds to a precision that ONNX export has not')
  return names[0]  # of bfloat16, which is computed in float32


def _clamp(graph, equation, names):
  low, x, high = names
  return graph.node('Min', [graph.node('Max', [x, low]), high])


def _select(graph, equation, names):
  which, *cases = names
  if len(cases) != 2:
    raise ConfigError('the network selects among several cases: no rule of ONNX export')
  otherwise, chosen = cases
  return graph.node('Where', [which, chosen, otherwise])


def _erfc(graph, equation, names):
  return graph.node('Sub', [_float(graph, 1), graph.node('Erf', names)])


def _exp2(graph, equation, names):
  return graph.node('Pow', [_float(graph, 2), *names])


def _cbrt(graph, equation, names):
  root = graph.node('Pow', [graph.node('Abs', names), _float(graph, 1 / 3)])
  return graph.node('Mul', [graph.node('Sign', names), root])


def _expm1(graph, equation, names):
  # tanh(x/2) · (exp(x) + 1), which loses no digits where x is small.
  half = graph.node('Tanh', [graph.node('Mul', [*names, _float(graph, 0.5)])])
  above = graph.node('Add', [graph.node('Exp', names), _float(graph, 1)])
  return graph.node('Mul', [half, above])


def _log1p(graph, equation, names):
  # log(u) · x / (u − 1) with u = 1 + x as it is rounded, which cancels the error.
  (x,), one = names, _float(graph, 1)
  u = graph.node('Add', [x, one])
  ratio = graph.node('Div', [x, graph.node('Sub', [u, one])])
  accurate = graph.node('Mul', [graph.node('Log', [u]), ratio])
  return graph.node('Where', [graph.node('Equal', [u, one]), x, accurate])


def _is_finite(graph, equation, names):
  x = names[0]
  odd = graph.node('Or', [graph.node('IsInf', [x]), graph.node('IsNaN', [x])])
  return graph.node('Not', [odd])


def _rem(graph, equation, names):
  return graph.node('Mod', names, fmod=1)  # of the sign of what is divided


def _round(graph, equation, names):
  if equation.params['rounding_method'] is lax.RoundingMethod.TO_NEAREST_EVEN:
    return graph.node('Round', names)
  size = graph.node('Add', [graph.node('Abs', names), _float(graph, 0.5)])
  sign = graph.node('Sign', names)
  return graph.node('Mul', [sign, graph.node('Floor', [size])])


RULES = {
  **{
    name: _simple(operation)
    for name, operation in {
      'abs': 'Abs', 'acos': 'Acos', 'acosh': 'Acosh', 'add': 'Add',
      'asin': 'Asin', 'asinh': 'Asinh', 'atan': 'Atan', 'atanh': 'Atanh',
      'ceil': 'Ceil', 'copy': 'Identity', 'cos': 'Cos',
      'cosh': 'Cosh', 'div': 'Div', 'eq': 'Equal', 'erf': 'Erf', 'exp': 'Exp',
      'floor': 'Floor', 'ge': 'GreaterOrEqual', 'gt': 'Greater', 'le': 'LessOrEqual',
      'log': 'Log', 'logistic': 'Sigmoid', 'lt': 'Less', 'max': 'Max', 'min': 'Min',
      'mul': 'Mul', 'neg': 'Neg', 'pow': 'Pow',
      'sign': 'Sign', 'sin': 'Sin', 'sinh': 'Sinh', 'sqrt': 'Sqrt',
      'stop_gradient': 'Identity', 'sub': 'Sub', 'tan': 'Tan', 'tanh': 'Tanh',
    }.items()
  },
  'and': _logical('And'),
  'cbrt': _cbrt,
  'clamp': _clamp,
  'convert_element_type': _cast,
  'erfc': _erfc,
  'exp2': _exp2,
  'expm1': _expm1,
  'integer_pow': _integer_pow,
  'is_finite': _is_finite,
  'log1p': _log1p,
  'ne': _chain('Equal', 'Not'),
  'not': _logical('Not'),
  'or': _logical('Or'),
  'reduce_precision': _reduce_precision,
  'rem': _rem,
  'round': _round,
  'rsqrt': _chain('Sqrt', 'Reciprocal'),
  'select_n': _select,
  'square': _square,
  'xor': _logical('Xor'),
}  # fmt: skip
