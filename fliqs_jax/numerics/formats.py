"""Numeric formats: what a name means, and the same as data that can be traced.

A format is not a Python branch but a row of numbers, so that a compiled step can
choose between formats by a gather, and is compiled once for all of them.

A block format gives each B elements along the contraction one scale, itself rounded to
a format: `mxfp4` is e2m1 in blocks of 32 whose scales are powers of two (E8M0). The
sizes B of a table are known when a step is compiled; the one that a layer uses is data.
"""

from collections.abc import Sequence
import dataclasses
import functools
import re
from typing import NamedTuple

import jax
import numpy as np

from fliqs_jax.errors import ConfigError, not_among

# float32's smallest exponent. A format that reaches down to it is used unscaled.
FLOAT32_MIN_EXPONENT = -126


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=['has_size', 'scale', 'tensor_largest'],
  meta_fields=['sizes'],
)
@dataclasses.dataclass(frozen=True)
class BlockScaling:
  """Scaling of the blocks of a format, as arrays like those of `NumericFormat`.

  Attributes:
    sizes: of the blocks in a table, static.
    has_size: bool for each of these sizes: the one that the format has, if any.
    scale: the format that the scale of a block is rounded to.
    tensor_largest: float32, the block scale that the largest value of the tensor gets,
      by one more scale for the whole tensor; 0 for a format without that one.
  """

  sizes: tuple[int, ...]
  has_size: tuple[jax.Array, ...]
  scale: 'NumericFormat'
  tensor_largest: jax.Array


class NumericFormat(NamedTuple):
  """Numbers by which a format rounds, as arrays that can be traced, stacked, gathered.

  The representable values are `±k · 2^(e - mantissa_bits)` for integers `k` with
  `exponent_min <= e <= exponent_max`, up to `max`; an integer format of `b` bits has
  `mantissa_bits = exponent_min = exponent_max = 0`, so its step is always 1.

  Fields are scalars in one format, `[K]` in a table of formats (`stack`).
  """

  mantissa_bits: jax.Array  # int32, explicit mantissa bits, 0 for integers
  exponent_min: jax.Array  # int32, exponent of the smallest normal value
  exponent_max: jax.Array  # int32, exponent of the largest value
  max: jax.Array  # float32, the largest finite value
  bits: jax.Array  # int32, bits that one value is stored in, scales aside
  clip: jax.Array  # float32, the MSE-optimal clipping threshold for N(0, 1) data,
  # 0 for the formats that are not scaled (bf16, float32) or have blocks
  blocks: BlockScaling | None = None  # None where no format of a table has blocks


@dataclasses.dataclass(frozen=True)
class Block:
  """The values that share one scale."""

  size: int  # of them, along the contraction of a layer
  scale: str  # name of the scale's format, one of `SCALES`


@dataclasses.dataclass(frozen=True)
class Format:
  """A numeric format by name.

  Attributes:
    name: as configs and results have it.
    family: `int`, `float`, or `unscaled` for bf16 and float32.
    bits: that one value is stored in, the sign included, scales aside.
    exponent_bits: 0 for integers.
    mantissa_bits: explicit ones, 0 for integers.
    exponent_min: exponent of the smallest normal value.
    exponent_max: exponent of the largest value.
    largest: the codes are from `-largest` to `largest`.
    clip: the MSE-optimal clipping threshold for N(0, 1) data, 0 where there is none.
    element: the name of the format of the values in a block; empty without blocks.
    block: None where the format has no blocks.
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
  element: str = ''
  block: Block | None = None

  @property
  def bits_per_value(self) -> float:
    """Bits that one value is stored in, its share of the block's scale included."""
    if self.block is None:
      return self.bits
    return self.bits + SCALES[self.block.scale].bits / self.block.size

  @property
  def row(self) -> NumericFormat:
    """The same as numpy scalars, one row of a table of formats."""
    return self.row_among(() if self.block is None else (self.block.size,))

  def row_among(self, block_sizes: Sequence[int]) -> NumericFormat:
    """Returns the row of a table in which formats have blocks of these sizes."""
    row = NumericFormat(
      mantissa_bits=np.int32(self.mantissa_bits),
      exponent_min=np.int32(self.exponent_min),
      exponent_max=np.int32(self.exponent_max),
      max=np.float32(self.largest),
      bits=np.int32(self.bits),
      clip=np.float32(self.clip),
    )
    if not block_sizes:
      return row
    size, scale = 0, find_format('float32')
    if self.block is not None:
      size, scale = self.block.size, SCALES[self.block.scale]
    return row._replace(
      blocks=BlockScaling(
        sizes=tuple(block_sizes),
        has_size=tuple(np.bool_(s == size) for s in block_sizes),
        scale=scale.row,
        tensor_largest=np.float32(scale.largest if scale.name == 'e4m3' else 0),
      )
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
  'e1m1': 1.952,
  'e2m0': 2.073,
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
    for bits in range(3, 9)
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


# Formats of a block's scale. E8M0 is a power of two alone, here of float32's normal
# range: its lowest, 2^-127, is a subnormal that the arithmetic of chips flushes to 0.
SCALES = {
  'e8m0': Format('e8m0', 'unscaled', 8, 8, 0, FLOAT32_MIN_EXPONENT, 127, 2.0**127, 0.0),
  'e4m3': _BY_NAME['e4m3'],
  'float16': Format('float16', 'float', 16, 5, 10, -14, 15, 65504.0, 0.0),
  'bf16': _BY_NAME['bf16'],
}
_DEFAULT_SCALE = 'float16'

# Block formats with names of their own: OCP Microscaling (MX) 1.0, and NVIDIA's NVFP4.
_NAMED_BLOCKS = {
  'mxfp8_e4m3': 'e4m3_b32_e8m0',
  'mxfp8_e5m2': 'e5m2_b32_e8m0',
  'mxfp6_e2m3': 'e2m3_b32_e8m0',
  'mxfp6_e3m2': 'e3m2_b32_e8m0',
  'mxfp4': 'e2m1_b32_e8m0',
  'mxint8': 'int8_b32_e8m0',
  'nvfp4': 'e2m1_b16_e4m3',
}
BLOCK_NAMES = (*_NAMED_BLOCKS, 'int4_b32', 'int4_b64', 'int4_b128', 'int8_b32')
_BLOCK_NAME = re.compile(rf'(\w+?)_b([1-9]\d{{0,4}})(?:_({"|".join(SCALES)}))?')


@functools.cache
def _block_format(name):
  """Returns the block format of that name, None where it is none."""
  match = _BLOCK_NAME.fullmatch(_NAMED_BLOCKS.get(name, name))
  if match is None or match[1] not in INTEGER_NAMES + FLOAT_NAMES or int(match[2]) < 2:
    return None
  block = Block(int(match[2]), match[3] or _DEFAULT_SCALE)
  # The scale of a block is that of its largest magnitude: there is no threshold.
  return dataclasses.replace(
    _BY_NAME[match[1]], name=name, clip=0.0, element=match[1], block=block
  )


def find_format(name: str) -> Format:
  """Returns the format of that name.

  Args:
    name: `int2` … `int8`, `eXmY` with X exponent and Y mantissa bits and a sign, of
      3 to 8 bits together, `bf16` or `float32`. `eXmY` follows `ml_dtypes` where it
      has a type of that name; `e4m3` is `float8_e4m3fn`. Block formats are those of
      `BLOCK_NAMES`, or `ELEMENT_bSIZE` and `ELEMENT_bSIZE_SCALE`, as `int4_b64` and
      `e4m3_b128_bf16`: an integer or eXmY, the values of a block, and one of `SCALES`,
      by default float16.

  Raises:
    ConfigError: for any other name; the message names the nearest one.
  """
  format = _BY_NAME.get(name) or _block_format(name)
  if format is None:
    expected = (
      f'one of int2..int8, eXmY of 3 to 8 bits, bf16, float32, '
      f'{", ".join(_NAMED_BLOCKS)}, or blocks of an element, as int4_b32 or '
      'e2m1_b16_e4m3'
    )
    names, meant = NAMES + BLOCK_NAMES, _NAMES_ELSEWHERE.get(str(name).lower(), ())
    given = f'unknown format {name!r}'
    if len(meant) > 1:
      given += f', which may be {" or ".join(meant)}'
    raise ConfigError(not_among(given, (*meant, name)[0], names, expected))
  return format


# What other libraries call our formats.
_NAMES_ELSEWHERE = {
  'bfloat16': ('bf16',),
  'fp32': ('float32',),
  'f32': ('float32',),
  'fp8': ('e4m3', 'e5m2'),
  'float8': ('e4m3', 'e5m2'),
  'float8_e4m3': ('e4m3',),
  'float8_e4m3fn': ('e4m3',),
  'float8_e5m2': ('e5m2',),
  'fp4': ('e2m1',),
  'float4_e2m1fn': ('e2m1',),
}


def is_format(name: str) -> bool:
  """Returns whether there is a format of that name."""
  return name in _BY_NAME or _block_format(name) is not None


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

    >>> import jax
    >>> import jax.numpy as jnp
    >>> from fliqs_jax.numerics import round_to_format, stack
    >>> table = stack(('int2', 'int4', 'e2m1'))
    >>> choice = jax.tree.map(lambda field: field[2], table)
    >>> round_to_format(jnp.array([0.3, 2.6]), choice)
    Array([0.5, 3. ], dtype=float32)
  """
  found = list(map(find_format, names))
  sizes = sorted({format.block.size for format in found if format.block})
  rows = [format.row_among(sizes) for format in found]
  return jax.tree.map(lambda *fields: np.stack(fields), *rows)


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
