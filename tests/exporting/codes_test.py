"""Codes as bits: those of ml_dtypes, packed as written down by hand."""

import importlib.util

import numpy as np
import pytest
import references

from fliqs_jax.exporting import codes, loading
from fliqs_jax.numerics import formats


@pytest.fixture(scope='module')
def reader():
  """The module that decodes files with NumPy alone."""
  path = loading.LOADERS / 'load_safetensors.py'
  spec = importlib.util.spec_from_file_location('reader', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def signed_values(name):
  positive = references.positive_codes(name).astype(np.float32)
  return np.concatenate([positive, -positive])


@pytest.mark.parametrize('name', references.LOW_PRECISION)
def test_every_value_survives_packing_and_the_reader(name, reader):
  values = signed_values(name)
  format = formats.find_format(name)
  assert np.array_equal(values.astype(codes.dtype_of(name)).astype(np.float32), values)
  packed = codes.pack(codes.to_bits(values, name), format.bits)
  assert packed.nbytes == -(-values.size * format.bits // 8)
  about = {
    'family': format.family,
    'bits': format.bits,
    'mantissa_bits': format.mantissa_bits,
    'exponent_min': format.exponent_min,
  }
  unpacked = reader.unpack(packed, format.bits, values.size)
  decoded = reader.code_values(about)[unpacked]
  assert np.array_equal(decoded, values)


@pytest.mark.parametrize('name', sorted({*references.ML_DTYPES} - {'bf16'}))
def test_bits_are_those_of_ml_dtypes(name):
  values = signed_values(name)
  dtype = references.ML_DTYPES[name]
  assert codes.dtype_of(name) == dtype
  own = values.astype(dtype).view(np.uint8)
  assert np.array_equal(codes.to_bits(values, name), own)


def test_codes_are_packed_from_the_lowest_bits_on():
  bits = codes.to_bits(np.array([1, -1, 7]), 'int4')
  assert codes.pack(bits, 4).tolist() == [0xF1, 0x07]
  bits = codes.to_bits(np.array([3, -3, 1]), 'int3')  # 011, 101, 001
  assert codes.pack(bits, 3).tolist() == [0b01101011, 0b0]


@pytest.mark.parametrize(
  'name, dtype',
  [('int3', 'int4'), ('int5', 'int8'), ('e3m1', 'float6_e3m2fn'), ('e2m5', 'bfloat16')],
)
def test_formats_without_a_type_have_the_narrowest_that_holds_them(name, dtype):
  assert codes.dtype_of(name).name == dtype
