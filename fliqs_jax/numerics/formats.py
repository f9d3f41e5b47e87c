"""Numeric formats as data: four numbers say how a format rounds.

A format is not a Python branch but a row of numbers, so that a compiled step can
choose between formats by a gather, and is compiled once for all of them.
"""

import re
from typing import NamedTuple

import jax
import numpy as np

from fliqs_jax.errors import not_among

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

_MIN_FLOAT_BITS, _MAX_FLOAT_BITS = 4, 8

INTEGER_NAMES = tuple(f'int{bits}' for bits in range(2, 9))
FLOAT_NAMES = tuple(
  f'e{exponent_bits}m{bits - 1 - exponent_bits}'
  for bits in range(_MIN_FLOAT_BITS, _MAX_FLOAT_BITS + 1)
  for exponent_bits in range(1, bits)
)
NAMES = INTEGER_NAMES + FLOAT_NAMES + ('bf16', 'float32')

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


def get_format(name: str) -> NumericFormat:
  """Returns the format of that name, as numpy scalars.

  Args:
    name: `int2` … `int8`, `eXmY` with X exponent and Y mantissa bits and a sign, of
      4 to 8 bits together, `bf16` or `float32`. `eXmY` follows `ml_dtypes` where it
      has a type of that name; `e4m3` is `float8_e4m3fn`.

  Raises:
    ValueError: for any other name; the message names the nearest one.
  """
  if name not in NAMES:
    expected = 'one of int2..int8, eXmY of 4 to 8 bits, bf16, float32'
    raise ValueError(not_among(f'unknown format {name!r}', name, NAMES, expected))
  if name == 'float32':
    return _make(23, FLOAT32_MIN_EXPONENT, 127, np.inf, 32, 0.0)
  if name == 'bf16':
    return _make(7, FLOAT32_MIN_EXPONENT, 127, 2.0**127 * (2 - 2.0**-7), 16, 0.0)
  if name in INTEGER_NAMES:
    bits = int(name.removeprefix('int'))
    return _make(0, 0, 0, 2.0 ** (bits - 1) - 1, bits, _NORMAL_CLIP[name])
  exponent_bits, mantissa_bits = map(int, re.fullmatch(r'e(\d)m(\d)', name).groups())
  bias = 2 ** (exponent_bits - 1) - 1
  exponent_max, significand = _RESERVED_CODES.get(
    name, (2**exponent_bits - 1 - bias, 2 - 2.0**-mantissa_bits)
  )
  return _make(
    mantissa_bits,
    1 - bias,
    exponent_max,
    2.0**exponent_max * significand,
    1 + exponent_bits + mantissa_bits,
    _NORMAL_CLIP[name],
  )


def stack(names: tuple[str, ...]) -> NumericFormat:
  """Returns the table of these formats: every field has shape `[len(names)]`."""
  return jax.tree.map(lambda *fields: np.stack(fields), *map(get_format, names))


def parse_names(spec: str) -> tuple[str, ...]:
  """Returns the format names of a search space's name or a comma-separated list.

  Raises:
    ValueError: where a name is unknown, repeated, or none is given.
  """
  names = SPACES.get(spec.strip()) or tuple(
    filter(None, map(str.strip, spec.split(',')))
  )
  if not names:
    raise ValueError(
      f'no format in {spec!r}: expected one of {", ".join(SPACES)} or a '
      'comma-separated list of format names'
    )
  for name in names:
    try:
      get_format(name)
    except ValueError as error:
      raise ValueError(f'{error} (search spaces: {", ".join(SPACES)})') from None
  if len(set(names)) < len(names):
    raise ValueError(f'a format is named twice in {spec!r}')
  return names


def _make(mantissa_bits, exponent_min, exponent_max, largest, bits, clip):
  return NumericFormat(
    mantissa_bits=np.int32(mantissa_bits),
    exponent_min=np.int32(exponent_min),
    exponent_max=np.int32(exponent_max),
    max=np.float32(largest),
    bits=np.int32(bits),
    clip=np.float32(clip),
  )
