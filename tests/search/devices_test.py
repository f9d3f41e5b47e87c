"""Devices: every format runs on each, and what it runs in holds its values."""

import ml_dtypes
import numpy as np
import pytest

from fliqs_jax.numerics import formats
from fliqs_jax.search import devices

DTYPES = {
  'int4': ml_dtypes.int4,
  'fp4': ml_dtypes.float4_e2m1fn,
  'int8': np.int8,
  'bf16': ml_dtypes.bfloat16,
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
  """Whether a cast keeps the values, scaled by some power of two."""
  targets = (
    (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2)
    if type_name == 'fp8'
    else (DTYPES[type_name],)
  )
  for dtype in targets:
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
    ('e2m1', ('fp4', 'fp8', 'bf16')),
    ('e3m0', ('fp8', 'bf16')),
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
    tables = devices.format_tables(device, formats.NAMES)
    assert tables.rates.shape == 2 * tables.bits.shape == 2 * (len(formats.NAMES),)
    np.testing.assert_array_equal(tables.rates, tables.rates.T)
    assert set(tables.rates.flat) <= set(device.peaks.values())
    # Never faster than the slower of the two, and stored in no fewer bits than named.
    alone = np.diag(tables.rates)
    assert (tables.rates <= np.minimum(alone[:, None], alone)).all()
    assert (tables.bits >= np.minimum(formats.stack(formats.NAMES).bits, 16)).all()


def test_an_unknown_device_names_the_nearest():
  with pytest.raises(ValueError, match="'tpu_v5'.*nearest is 'tpu_v5"):
    devices.get_device('tpu_v5')
