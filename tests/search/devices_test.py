"""Devices: every format runs on each, and what it runs in holds its values."""

import ml_dtypes
import numpy as np
import pytest

from fliqs_jax.errors import ConfigError
from fliqs_jax.numerics import formats
from fliqs_jax.search import devices

DTYPES = {
  'int4': (ml_dtypes.int4,),
  'fp4': (ml_dtypes.float4_e2m1fn,),
  'fp6': (ml_dtypes.float6_e2m3fn, ml_dtypes.float6_e3m2fn),
  'fp8': (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2),
  'int8': (np.int8,),
  'bf16': (ml_dtypes.bfloat16,),
}


def _values(name):
  """The positive values of a format of up to 8 bits, in float64."""
  row = formats.get_format(name)
  exponents = np.arange(row.exponent_min, row.exponent_max + 1)
  multiples = np.arange(1, 2 ** (row.mantissa_bits + 1))
  if name in formats.INTEGER_NAMES:
    multiples = np.arange(1, int(row.max) + 1)
  steps = 2.0 ** (exponents - float(row.mantissa_bits))
  values = np.unique(multiples[:, None] * steps)
  return values[values <= row.max]


def _holds(type_name, values):
  """Returns whether a cast keeps the values, scaled by some power of two."""
  for dtype in DTYPES[type_name]:
    info = np.iinfo if dtype == np.int8 else ml_dtypes.iinfo
    is_integer = type_name.startswith('int')
    largest = float(info(dtype).max if is_integer else ml_dtypes.finfo(dtype).max)
    for shift in range(-4, 20):
      scaled = values * 2.0**-shift if not is_integer else values * 2.0 ** (shift - 4)
      if scaled.max() <= largest:
        if np.array_equal(scaled.astype(dtype).astype(float), scaled):
          return True
  return False


def test_holding_types_hold_every_value():
  for name in formats.INTEGER_NAMES + formats.FLOAT_NAMES:
    for type_name in devices.holding_types(name):
      assert _holds(type_name, _values(name)), (name, type_name)


@pytest.mark.parametrize(
  ('name', 'types'),
  [
    ('int3', ('int4', 'int8', 'fp8', 'bf16')),
    ('int4', ('int4', 'int8', 'fp8', 'bf16')),
    ('int6', ('int8', 'bf16')),
    ('int8', ('int8', 'bf16')),
    ('e2m1', ('fp4', 'fp6', 'fp8', 'bf16')),
    ('e2m3', ('fp6', 'fp8', 'bf16')),
    ('mxfp6_e3m2', ('fp6', 'fp8', 'bf16')),
    ('int4_b32', ('int4', 'int8', 'fp8', 'bf16')),
    ('e3m0', ('fp6', 'fp8', 'bf16')),
    ('e4m3', ('fp8', 'bf16')),
    ('e5m2', ('fp8', 'bf16')),
    ('e3m4', ('bf16',)),
    ('e6m1', ('bf16',)),
    ('bf16', ('bf16',)),
    ('float32', ('bf16',)),
  ],
)
def test_holding_types(name, types):
  assert devices.holding_types(name) == types


@pytest.mark.parametrize(
  ('device', 'names', 'expected'),
  [
    ('a100', ('int4',), 'int4'),
    ('h100', ('int4',), 'int8'),
    ('b200', ('e2m1',), 'fp4'),
    ('h100', ('e2m1',), 'fp8'),
    ('a100', ('e2m1',), 'bf16'),
    ('tpu_v5e', ('e4m3',), 'bf16'),
    ('tpu_v5p', ('e4m3',), 'fp8'),
    ('tpu_v6e', ('e4m3',), 'fp8'),
    ('tpu_v4', ('int2',), 'int8'),
    ('a100', ('int4', 'int8'), 'int8'),
    ('b200', ('e2m1', 'e4m3'), 'fp8'),
    ('h100', ('int4', 'e4m3'), 'fp8'),
    ('h100', ('int8', 'e4m3'), 'bf16'),
    ('h100', ('int8', 'bf16'), 'bf16'),
    ('tpu_7x', ('int8',), 'bf16'),
    ('tpu_7x', ('e4m3', 'e5m2'), 'fp8'),
    # Blocks: the scales of MX and NVFP4 on Blackwell, of MX on MI355X.
    ('b200', ('nvfp4',), 'fp4'),
    ('b200', ('mxfp4', 'mxfp8_e4m3'), 'fp8'),
    ('b200', ('mxfp4', 'mxfp6_e2m3'), 'fp6'),
    ('b200', ('nvfp4', 'mxfp4'), 'bf16'),
    ('b200', ('nvfp4', 'mxfp8_e4m3'), 'bf16'),
    ('b200', ('mxfp8_e4m3', 'e4m3'), 'fp8'),
    ('b200', ('int4_b32', 'bf16'), 'bf16'),
    ('b200', ('mxint8',), 'bf16'),
    ('mi355x', ('mxfp6_e3m2',), 'fp6'),
    ('mi355x', ('nvfp4',), 'bf16'),
    ('h100', ('mxfp8_e4m3',), 'bf16'),
    ('tpu_v5e', ('int4_b32', 'int8'), 'bf16'),
  ],
)
def test_native_types(device, names, expected):
  assert devices.native_type(devices.get_device(device), *names) == expected
  assert devices.native_type(devices.get_device(device), *names[::-1]) == expected


@pytest.mark.parametrize('name', devices.DEVICES)
class TestEveryDevice:
  def test_peaks(self, name):
    device = devices.get_device(name)
    assert 'bf16' in device.peaks and set(device.peaks) <= set(devices.TYPE_BITS)
    assert device.bandwidth > 0 and min(device.peaks.values()) > 0

  def test_wider_types_are_never_faster(self, name):
    peaks = devices.get_device(name).peaks
    for narrow, bits in devices.TYPE_BITS.items():
      for wide, more_bits in devices.TYPE_BITS.items():
        if narrow in peaks and wide in peaks and bits < more_bits:
          assert peaks[narrow] >= peaks[wide]

  def test_every_pair_of_formats_runs(self, name):
    device = devices.get_device(name)
    names = formats.NAMES + formats.BLOCK_NAMES
    tables = devices.format_tables(device, names)
    assert tables.rates.shape == 2 * tables.bits.shape == 2 * (len(names),)
    np.testing.assert_array_equal(tables.rates, tables.rates.T)
    assert set(tables.rates.flat) <= set(device.peaks.values())
    # Never faster than the slower of the two, and stored in no fewer bits than named.
    alone = np.diag(tables.rates)
    assert (tables.rates <= np.minimum(alone[:, None], alone)).all()
    assert (tables.bits >= [min(formats.find_format(n).bits, 16) for n in names]).all()


@pytest.mark.parametrize(
    ('device', 'names'),
    [
        ('tpu_v5e', ('int4', 'int8', 'bf16')),
        ('tpu_v6e', ('int4', 'int8', 'bf16')),
        ('tpu_7x', ('e4m3', 'e5m2', 'bf16')),
        ('tpu_8i', ('e2m1', 'e4m3', 'e5m2', 'bf16')),
        ('a100', ('int4', 'int8', 'bf16')),
        ('h100', ('int8', 'e4m3', 'e5m2', 'bf16')),
        (
            'b300',
            ('mxfp4', 'nvfp4', 'mxfp6_e2m3', 'mxfp6_e3m2', 'mxfp8_e4m3', 'mxfp8_e5m2',
             'bf16'),
        ),
        (
            'mi355x',
            ('mxfp4', 'mxfp6_e2m3', 'mxfp6_e3m2', 'int8', 'mxfp8_e4m3', 'mxfp8_e5m2',
             'bf16'),
        ),
        ('xeon_8480', ('int8', 'bf16')),
    ],
)  # fmt: skip
def test_fast_formats(device, names):
  assert devices.fast_formats(device) == names
  rates = [devices.rate(devices.get_device(device), name) for name in names]
  assert min(rates[:-1]) > rates[-1]


def test_a_device_without_fast_formats_is_an_error():
  with pytest.raises(ConfigError, match='^tpu_v4 multiplies no format faster than'):
    devices.fast_formats('tpu_v4')


@pytest.mark.parametrize(
  ('device', 'weights', 'activations', 'bits'),
  [
    ('b200', 'nvfp4', 'nvfp4', 4.5),
    ('h100', 'nvfp4', 'nvfp4', 4.5),  # stored alone
    ('tpu_v5e', 'int4_b128', 'bf16', 4.125),
    ('h100', 'int4', 'int4', 8),
  ],
)
def test_blocks_are_stored_as_they_are(device, weights, activations, bits):
  tables = devices.format_tables(devices.get_device(device), (weights, activations))
  assert tables.bits[0] == bits


def test_emulated_pairs_name_the_type_and_the_rate():
  both = lambda name: {'weights': name, 'activations': name}  # noqa: E731
  found = {
    'a': both('nvfp4'),
    'b': both('nvfp4'),
    'c': both('int8'),
    'd': both('bf16'),
    'e': {'weights': 'int4_b32', 'activations': 'bf16'},
    'f': {'weights': 'e2m1', 'activations': 'e4m3'},
  }
  assert devices.emulated_pairs('b200', found) == {}
  assert devices.emulated_pairs('h100', found) == {
    ('nvfp4', 'nvfp4'): 'nvfp4 is emulated on h100: multiplied in bf16, at 989 TFLOPS'
  }
  assert list(devices.emulated_pairs('a100', found).values()) == [
    'nvfp4 is emulated on a100: multiplied in bf16, at 312 TFLOPS',
    'e2m1 × e4m3 is emulated on a100: multiplied in bf16, at 312 TFLOPS',
  ]


def test_an_unknown_device_names_the_nearest():
  with pytest.raises(ValueError, match="'tpu_v5'.*nearest is 'tpu_v5"):
    devices.get_device('tpu_v5')
