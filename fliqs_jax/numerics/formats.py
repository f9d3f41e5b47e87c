"""Numeric formats: what a name means, and the same as data that can be traced.

A format is not a Python branch but a row of numbers, so that a compiled step can
choose between formats by a gather, and is compiled once for all of them.
"""

import dataclasses
from typing import NamedTuple

import jax
import numpy as np

from fliqs_jax.errors import ConfigError, not_among

# float32's smallest exponent. A format that reaches down to it is used unscaled.
FLOAT32_MIN_EXPONENT = -126


class NumericFormat(NamedTuple):
  """How a numeric format rounds, as arrays that can be traced, stacked, gathered.

  The representable values are `±k · 2^(e - mantissa_bits)` for integers `k` with
  `exponent_min <= e <= exponent_max`, up to `max`; an integer format of `b` bits has
  `mantissa_bits = exponent_min = exponent_max = 0`, so its step is always 1.

  Fields are scalars in one format, `[K]` in a table of formats (`stack`).
  """

  mantissa_bits: jax.Array  # int32, explicit mantissa bits, 0 for integers
  exponent_min: jax.Array  # int32, exponent of the smallest normal value
  exponent_max: jax.Array  # int32, exponent of the largest value
  max: jax.Array  # float32, the largest finite value
  bits: jax.Array  # int32, bits that one value is stored in
  clip: jax.Array  # float32, the MSE-optimal clipping threshold for N(0, 1) data,
  # 0 for the formats that are not scaled (bf16, float32)


@dataclasses.dataclass(frozen=True)
class Format:
  """A numeric format by name.

  Attributes:
    name: as configs and results have it.
    family: `int`, `float`, or `unscaled` for bf16 and float32.
    bits: that one value is stored in, the sign included.
    exponent_bits: 0 for integers.
    mantissa_bits: explicit ones, 0 for integers.
    exponent_min: exponent of the smallest normal value.
    exponent_max: exponent of the largest value.
    largest: the codes are from `-largest` to `largest`.
    clip: the MSE-optimal clipping threshold for N(0, 1) data, 0 where not scaled.
  """

  name: str
  family: str
  bits: int
  exponent_bits: int
  mantissa_bits: int
  exponent_min: int
  exponent_max: int
  largest: float
  clip: float

  @property
  def row(self) -> NumericFormat:
    """The same as numpy scalars, one row of a table of formats."""
    return NumericFormat(
      mantissa_bits=np.int32(self.mantissa_bits),
      exponent_min=np.int32(self.exponent_min),
      exponent_max=np.int32(self.exponent_max),
      max=np.float32(self.largest),
      bits=np.int32(self.bits),
      clip=np.float32(self.clip),
    )


# MSE-optimal clipping thresholds of standard normal data, in units of its standard
# deviation. Printed by benchmarks/clipping_thresholds.py; formats_test.py computes
# them again. (FLIQS, Figure 4a, measures the same on the activations of a network.)
_NORMAL_CLIP = {
  'int2': 1.224,
  'int3': 1.952,
  'int4': 2.474,
  'int5': 2.899,
  'int6': 3.270,
  'int7': 3.607,
  'int8': 3.921,
  'e1m2': 2.474,
  'e2m1': 2.922,
  'e3m0': 4.194,
  'e1m3': 2.899,
  'e2m2': 3.379,
  'e3m1': 7.357,
  'e4m0': 4.199,
  'e1m4': 3.270,
  'e2m3': 3.748,
  'e3m2': 4.542,
  'e4m1': 7.378,
  'e5m0': 4.199,
  'e1m5': 3.607,
  'e2m4': 4.066,
  'e3m3': 4.913,
  'e4m2': 9.037,
  'e5m1': 7.378,
  'e6m0': 4.199,
  'e1m6': 3.921,
  'e2m5': 4.352,
  'e3m4': 5.086,
  'e4m3': 9.129,
  'e5m2': 9.037,
  'e6m1': 7.378,
  'e7m0': 4.199,
}

# Formats of ml_dtypes that do not use every code for a finite number; the largest
# finite value, as (exponent, significand). All other eXmY are all-finite, like the
# OCP Microscaling formats e2m1, e2m3 and e3m2.
_RESERVED_CODES = {
  'e4m3': (8, 1.75),  # float8_e4m3fn: the top code is NaN
  'e5m2': (15, 1.75),  # float8_e5m2: the top exponent is inf and NaN
  'e3m4': (3, 1.9375),  # float8_e3m4: the top exponent is inf and NaN
}


def _integer(bits):
  name, largest = f'int{bits}', 2.0 ** (bits - 1) - 1
  return Format(name, 'int', bits, 0, 0, 0, 0, largest, _NORMAL_CLIP[name])


def _float(exponent_bits, mantissa_bits):
  name = f'e{exponent_bits}m{mantissa_bits}'
  bias = 2 ** (exponent_bits - 1) - 1
  exponent_max, significand = _RESERVED_CODES.get(
    name, (2**exponent_bits - 1 - bias, 2 - 2.0**-mantissa_bits)
  )
  return Format(
    name=name,
    family='float',
    bits=1 + exponent_bits + mantissa_bits,
    exponent_bits=exponent_bits,
    mantissa_bits=mantissa_bits,
    exponent_min=1 - bias,
    exponent_max=exponent_max,
    largest=2.0**exponent_max * significand,
    clip=_NORMAL_CLIP[name],
  )


def _unscaled(name, bits, largest):
  minimum = FLOAT32_MIN_EXPONENT
  return Format(name, 'unscaled', bits, 8, bits - 9, minimum, 127, largest, 0.0)


_ALL = (
  *map(_integer, range(2, 9)),
  *(
    _float(exponent_bits, bits - 1 - exponent_bits)
    for bits in range(4, 9)
    for exponent_bits in range(1, bits)
  ),
  _unscaled('bf16', 16, 2.0**127 * (2 - 2.0**-7)),
  _unscaled('float32', 32, np.inf),
)
_BY_NAME = {format.name: format for format in _ALL}

NAMES = tuple(_BY_NAME)
INTEGER_NAMES = tuple(format.name for format in _ALL if format.family == 'int')
FLOAT_NAMES = tuple(format.name for format in _ALL if format.family == 'float')

# The search spaces of the paper: FLIQS-S (few, widely supported) and FLIQS-L (many).
SPACES = {
    'int_small': ('int4', 'int8', 'bf16'),
    'int_large': ('int4', 'int5', 'int6', 'int7', 'int8', 'bf16'),
    'float_small': ('e2m1', 'e4m3', 'bf16'),
    'float_large': (
        'e2m1',
        'e2m2', 'e3m1',
        'e2m3', 'e3m2', 'e4m1',
        'e2m4', 'e3m3', 'e4m2', 'e5m1',
        'e2m5', 'e3m4', 'e4m3', 'e5m2',
        'bf16',
    ),
}  # fmt: skip


def find_format(name: str) -> Format:
  """Returns the format of that name.

  Args:
    name: `int2` … `int8`, `eXmY` with X exponent and Y mantissa bits and a sign, of
      4 to 8 bits together, `bf16` or `float32`. `eXmY` follows `ml_dtypes` where it
      has a type of that name; `e4m3` is `float8_e4m3fn`.

  Raises:
    ConfigError: for any other name; the message names the nearest one.
  """
  if name not in _BY_NAME:
    expected = 'one of int2..int8, eXmY of 4 to 8 bits, bf16, float32'
    raise ConfigError(not_among(f'unknown format {name!r}', name, NAMES, expected))
  return _BY_NAME[name]


def get_format(name: str) -> NumericFormat:
  """Returns the format of that name as a row of numpy scalars, ready to be traced.

  Args:
    name: as in `find_format`.

  Raises:
    ConfigError: for an unknown name; the message names the nearest one.

  Examples:
    >>> from fliqs_jax.numerics import get_format
    >>> float(get_format('e4m3').max)
    448.0
  """
  return find_format(name).row


def stack(names: tuple[str, ...]) -> NumericFormat:
  """Returns the table of these formats: every field has shape `[len(names)]`.

  Examples:
    A choice between formats is a gather, so one compiled function serves all of them:

    >>> import jax.numpy as jnp
    >>> from fliqs_jax.numerics import NumericFormat, round_to_format, stack
    >>> table = stack(('int2', 'int4', 'e2m1'))
    >>> choice = NumericFormat(*(field[2] for field in table))
    >>> round_to_format(jnp.array([0.3, 2.6]), choice)
    Array([0.5, 3. ], dtype=float32)
  """
  return jax.tree.map(lambda *fields: np.stack(fields), *map(get_format, names))


def parse_names(spec: str) -> tuple[str, ...]:
  """Returns the format names of a search space's name or a comma-separated list.

  Raises:
    ConfigError: where a name is unknown, repeated, or none is given.

  Examples:
    >>> from fliqs_jax.numerics import parse_names
    >>> parse_names('float_small')
    ('e2m1', 'e4m3', 'bf16')
  """
  names = SPACES.get(spec.strip()) or tuple(
    filter(None, map(str.strip, spec.split(',')))
  )
  if not names:
    raise ConfigError(
      f'no format in {spec!r}: expected one of {", ".join(SPACES)} or a '
      'comma-separated list of format names'
    )
  for name in names:
    try:
      get_format(name)
    except ConfigError as error:
      raise ConfigError(f'{error} (search spaces: {", ".join(SPACES)})') from None
  if len(set(names)) < len(names):
    raise ConfigError(f'a format is named twice in {spec!r}')
  return names
