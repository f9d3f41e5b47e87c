"""Formats: names, values and constants, against ml_dtypes and published thresholds."""

import importlib.util
import pathlib
import re

import jax
import ml_dtypes
import numpy as np
import pytest
import references

from fliqs_jax.numerics import formats


def _load_benchmark(name):
  path = pathlib.Path(__file__).parents[2] / 'benchmarks' / f'{name}.py'
  spec = importlib.util.spec_from_file_location(name, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.fixture(scope='module')
def thresholds():
  return _load_benchmark('clipping_thresholds')


def test_names_are_integers_floats_of_three_to_eight_bits_and_two_wide_ones():
  integers = [f'int{bits}' for bits in range(2, 9)]
  floats = [
    f'e{exponent}m{mantissa}'
    for exponent in range(1, 8)
    for mantissa in range(8)
    if 3 <= 1 + exponent + mantissa <= 8
  ]
  assert len(floats) == 27
  assert set(formats.NAMES) == {*integers, *floats, 'bf16', 'float32'}
  assert len(formats.NAMES) == len(set(formats.NAMES))


@pytest.mark.parametrize('name', formats.NAMES)
def test_bits_are_those_in_the_name(name):
  bits = {'bf16': 16, 'float32': 32}.get(name)
  if bits is None:
    digits = list(map(int, re.findall(r'\d', name)))
    bits = digits[0] if name.startswith('int') else 1 + sum(digits)
  assert formats.get_format(name).bits == bits


@pytest.mark.parametrize('name', references.ML_DTYPES)
def test_float_parameters_equal_ml_dtypes(name):
  info = ml_dtypes.finfo(references.ML_DTYPES[name])
  f = formats.get_format(name)
  assert float(f.max) == float(info.max)
  assert f.mantissa_bits == info.nmant
  assert f.exponent_min == info.minexp
  assert f.exponent_max == np.floor(np.log2(float(info.max)))
  assert f.bits == info.bits


def test_float32_parameters_equal_numpys():
  info, f = np.finfo(np.float32), formats.get_format('float32')
  assert (f.mantissa_bits, f.exponent_min) == (info.nmant, info.minexp)
  assert f.max == np.inf  # so that infinity stays infinity
  assert f.bits == 32


@pytest.mark.parametrize('name', formats.FLOAT_NAMES)
def test_float_maximum_is_the_largest_code(name):
  assert float(formats.get_format(name).max) == references.largest(name)


@pytest.mark.parametrize('bits', range(2, 9))
def test_integers_have_unit_steps_and_are_symmetric(bits):
  f = formats.get_format(f'int{bits}')
  assert (f.mantissa_bits, f.exponent_min, f.exponent_max) == (0, 0, 0)
  assert f.max == 2 ** (bits - 1) - 1


@pytest.mark.parametrize('name', ['bf16', 'float32'])
def test_wide_formats_have_no_threshold(name):
  assert formats.get_format(name).clip == 0


def test_fields_have_the_documented_dtypes():
  dtypes = (np.int32, np.int32, np.int32, np.float32, np.int32, np.float32)
  for name in formats.NAMES:
    *fields, blocks = formats.get_format(name)
    assert blocks is None
    for field, dtype in zip(fields, dtypes, strict=True):
      assert (field.dtype, field.shape) == (dtype, ())


@pytest.mark.parametrize(
  ('name', 'nearest'),
  [
    ('int88', 'int8'),
    ('e4m3fn', 'e4m3'),
    ('E5M2', 'e5m2'),
    ('float', 'float32'),
    ('bfloat16', 'bf16'),
    ('fp32', 'float32'),
    ('float8_e5m2', 'e5m2'),
    ('FP8', 'e4m3'),  # or e5m2, which is said as well
    ('int16', 'int6'),  # int6 plus a letter; integers end at 8 bits
  ],
)
def test_unknown_name_names_the_nearest(name, nearest):
  with pytest.raises(ValueError, match=f'{name!r}.*nearest is {nearest!r}'):
    formats.get_format(name)


@pytest.mark.parametrize('name', ['', 'int1', 'int9', 'e8m0', 'e0m3', 'e4m4', 'e1m0'])
def test_unsupported_sizes_are_unknown(name):
  with pytest.raises(ValueError, match='unknown format'):
    formats.get_format(name)


@pytest.mark.parametrize('space', formats.SPACES)
def test_a_search_space_stands_for_its_formats(space):
  assert formats.parse_names(space) == formats.SPACES[space]


def test_search_spaces_are_the_papers():
  assert formats.SPACES['int_small'] == ('int4', 'int8', 'bf16')
  assert formats.SPACES['int_large'] == (
      'int4', 'int5', 'int6', 'int7', 'int8', 'bf16'
  )  # fmt: skip
  assert formats.SPACES['float_small'] == ('e2m1', 'e4m3', 'bf16')
  large = formats.SPACES['float_large']
  bits = formats.stack(large).bits
  assert bits.min() == 4 and set(bits[:-1]) == {4, 5, 6, 7, 8} and large[-1] == 'bf16'


@pytest.mark.parametrize(
  ('spec', 'names'),
  [
    ('int4', ('int4',)),
    ('int4,int8', ('int4', 'int8')),
    (' int4 ,  e2m1 ', ('int4', 'e2m1')),
    ('int8,int4', ('int8', 'int4')),  # the order is the user's
  ],
)
def test_a_list_is_parsed_in_order(spec, names):
  assert formats.parse_names(spec) == names


@pytest.mark.parametrize('spec', ['', ' ', ',', ' , '])
def test_an_empty_list_is_an_error(spec):
  with pytest.raises(ValueError, match='no format.*int_small'):
    formats.parse_names(spec)


@pytest.mark.parametrize('spec', ['int4,int4', 'int4, int8 ,int4'])
def test_a_repeated_format_is_an_error(spec):
  with pytest.raises(ValueError, match='named twice'):
    formats.parse_names(spec)


def test_an_unknown_format_in_a_list_names_formats_and_spaces():
  with pytest.raises(ValueError, match="'int44'.*'int4'.*int_small"):
    formats.parse_names('int8,int44')


@pytest.mark.parametrize('count', [1, 2, len(formats.NAMES)])
def test_stack_has_one_row_a_format(count):
  names = formats.NAMES[:count]
  table = formats.stack(names)
  for field in jax.tree.leaves(table):
    assert field.shape == (count,)
  for row, name in enumerate(names):
    found = jax.tree.map(lambda field: field[row], table)  # noqa: B023
    assert found == formats.get_format(name)


def test_a_table_has_the_sizes_of_all_its_blocks():
  table = formats.stack(('int4', 'mxfp4', 'nvfp4', 'int4_b128'))
  assert table.blocks.sizes == (16, 32, 128)
  np.testing.assert_array_equal(
    np.stack(table.blocks.has_size, axis=-1),
    [[False] * 3, [False, True, False], [True, False, False], [False, False, True]],
  )
  np.testing.assert_array_equal(table.blocks.tensor_largest, [0, 0, 448, 0])
  assert formats.stack(('int4', 'bf16')).blocks is None


@pytest.mark.parametrize(
  ('name', 'bits'),
  [
    ('mxfp8_e4m3', 8.25),
    ('mxfp8_e5m2', 8.25),
    ('mxfp6_e2m3', 6.25),
    ('mxfp6_e3m2', 6.25),
    ('mxfp4', 4.25),
    ('mxint8', 8.25),
    ('nvfp4', 4.5),
    ('int4_b32', 4.5),
    ('int4_b64', 4.25),
    ('int4_b128', 4.125),
    ('int8_b32', 8.5),
    ('int3_b48_bf16', 3 + 1 / 3),
    ('e3m0_b16_e4m3', 4.5),
    ('int8', 8),
    ('bf16', 16),
  ],
)
def test_bits_of_a_value_have_its_share_of_the_scale(name, bits):
  format = formats.find_format(name)
  assert format.bits_per_value == pytest.approx(bits)
  assert format.name == name and formats.is_format(name)


@pytest.mark.parametrize('name', formats.BLOCK_NAMES)
def test_codes_of_a_block_format_are_those_of_its_element(name):
  format = formats.find_format(name)
  element = formats.get_format(format.element)
  assert formats.get_format(name)._replace(blocks=None, clip=element.clip) == element


@pytest.mark.parametrize(
  ('name', 'nearest'),
  [
    ('mxfp8', 'mxfp4'),
    ('nvfp8', 'nvfp4'),
    ('int4_b1', 'int4_b128'),
    ('bf16_b32', 'bf16'),
    ('e4m3_b32_e8m1', 'int4_b32'),
    ('int4_b032_f16', 'int4_b32'),
  ],
)
def test_an_unknown_block_format_names_the_nearest(name, nearest):
  with pytest.raises(ValueError, match=f'{name!r}.*mxfp4.*nearest is {nearest!r}'):
    formats.find_format(name)


@pytest.mark.parametrize('name', references.LOW_PRECISION)
def test_threshold_constants_are_what_the_benchmark_computes(thresholds, name):
  computed = thresholds.optimal_threshold(name)
  assert float(formats.get_format(name).clip) == pytest.approx(computed, rel=1e-3)


@pytest.mark.parametrize('name', references.LOW_PRECISION)
def test_the_benchmark_enumerates_the_codes(thresholds, name):
  values = thresholds.representable_values(name)
  np.testing.assert_array_equal(values, references.positive_codes(name))


@pytest.mark.parametrize(
    ('name', 'published'),
    [
        ('int2', 1.2), ('int3', 2.0), ('int4', 2.5), ('int5', 2.9), ('int6', 3.3),
        ('int7', 3.6), ('int8', 3.9),
        ('e2m1', 2.9), ('e2m3', 3.7), ('e3m2', 4.5), ('e3m4', 5.1),
    ],
)  # fmt: skip
def test_thresholds_agree_with_the_published_digits(name, published):
  assert round(float(formats.get_format(name).clip), 1) == published


@pytest.mark.parametrize(('name', 'published'), [('e4m3', 8.2), ('e5m2', 8.7)])
def test_flat_minima_are_as_low_as_the_published_ones(thresholds, name, published):
  values = references.positive_codes(name)
  ours = thresholds.normal_mse(float(formats.get_format(name).clip), values)
  assert ours <= 1.001 * thresholds.normal_mse(published, values)


@pytest.mark.parametrize('mantissa_bits', range(2, 7))
def test_one_exponent_bit_is_an_integer_in_disguise(mantissa_bits):
  # Subnormals and the one binade of normals have the same step.
  integer = formats.get_format(f'int{mantissa_bits + 2}')
  f = formats.get_format(f'e1m{mantissa_bits}')
  assert f.max * 2.0 ** (mantissa_bits - 1) == integer.max
  assert f.clip == integer.clip
