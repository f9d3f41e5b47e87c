"""Block formats, bit by bit, against independent implementations of each."""

import functools

import jax
from jax._src.cudnn import scaled_matmul_stablehlo as jax_blocks
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
import references
from references import assert_same_bits

from fliqs_jax.numerics import calibration, formats
from fliqs_jax.numerics.formats import find_format

MX_NAMES = [name for name in formats.BLOCK_NAMES if name.startswith('mx')]
INTEGERS = ('int4_b32', 'int8_b32', 'int4_b64_bf16', 'int3_b7')
LENGTH = 256  # of the axis along which blocks lie


@functools.cache
def values() -> np.ndarray:
  """Returns float32[40, 256]: rows of all magnitudes, within which values vary too."""
  rng = np.random.default_rng(0)
  x = rng.normal(size=(40, LENGTH)) * np.exp2(rng.normal(0, 3, (40, LENGTH)))
  x *= np.exp2(np.linspace(-90, 90, 40))[:, None]
  x[3, :32], x[4, 32:64:2] = 0, 0  # a block of zeros, and zeros in a block
  x[5, :32] = 1.75 * 2.0 ** np.arange(-16, 16)  # the largest significand of e4m3
  x[6, :32] = np.where(np.arange(32) == 7, 1, 1e-30)  # what vanishes beside another
  return x.astype(np.float32)


def quantize(x, name, axis=-1, absmax=None, groups=1):
  """Returns the codes, the scale of each block and the values of a tensor."""
  absmax = np.float32(np.abs(x).max() if absmax is None else absmax)
  mean_square = np.float32(1)  # of formats without blocks alone
  axis %= x.ndim
  quantizer = _calibrate(axis, groups)(x, formats.get_format(name), mean_square, absmax)
  scales = np.asarray(quantizer.blocks.of_units)
  codes, found = jax.jit(lambda q, x: (q.codes(x), q.values(x)))(quantizer, x)
  return np.asarray(codes), scales, np.asarray(found), np.asarray(quantizer.scale)


@functools.cache
def _calibrate(axis, groups):
  return jax.jit(
    functools.partial(
      calibration.calibrate_blocks, calibration='rms', axis=axis, groups=groups
    )
  )


def blocks_of(x, size):
  """Splits the last axis into blocks, the last filled with zeros."""
  x = np.concatenate([x, np.zeros((*x.shape[:-1], -x.shape[-1] % size))], axis=-1)
  return x.reshape(*x.shape[:-1], -1, size).astype(np.float64)


def reference(x, name):
  """Returns codes and scales of blocks along the last axis, in float64.

  OCP Microscaling 1.0, Section 6.3, where scales are powers of two; else the block's
  largest magnitude over that of the element, rounded to the format of scales.
  """
  format = find_format(name)
  blocks = blocks_of(x, format.block.size)
  largest = references.largest(format.element)
  absmax = np.abs(blocks).max(axis=-1, keepdims=True)
  if format.block.scale == 'e8m0':
    exponent = np.floor(np.log2(np.where(absmax > 0, absmax, 2.0**-126)))
    scales = np.exp2(np.maximum(exponent - np.floor(np.log2(largest)), -126))
  else:
    dtype = {'float16': np.float16, 'bf16': references.ML_DTYPES['bf16']}
    ratio = absmax.astype(np.float32) / np.float32(largest)
    limit = np.float32(65504 if format.block.scale == 'float16' else np.inf)
    scales = np.minimum(ratio, limit).astype(dtype[format.block.scale])
    scales = scales.astype(np.float64)
  quotient = (blocks / np.where(scales > 0, scales, 1)).astype(np.float32)
  codes = references.nearest_code(quotient, format.element)
  shape = (*x.shape[:-1], -1)
  return (
    codes.reshape(shape)[..., : x.shape[-1]].astype(np.float32),
    scales[..., 0].astype(np.float32),
    (codes * scales).reshape(shape)[..., : x.shape[-1]].astype(np.float32),
  )


@pytest.mark.parametrize('name', [*MX_NAMES, *INTEGERS, 'e3m0_b16_e8m0'])
def test_values_and_scales_are_those_of_the_specification(name):
  x = values()
  if name in INTEGERS:  # within the range of float16
    x = x[15:25]
  codes, scales, found, tensor_scale = quantize(x, name)
  expected_codes, expected_scales, expected = reference(x, name)
  assert tensor_scale == 1
  assert_same_bits(scales[:, 0], expected_scales)
  assert_same_bits(codes, expected_codes)
  assert_same_bits(found, expected)


def test_values_are_divided_by_their_scales_exactly():
  # Not multiplied with the scales' inverses, which are rounded: a tie would be none.
  multiples = np.tile(np.arange(-7, 8) + 0.5, 2)[:-1]  # ties but for the last, 7.5
  multiples = np.where(multiples > 7, 7, multiples)
  rng = np.random.default_rng(0)
  scales = rng.integers(1025, 2048, 5_000).astype(np.float32) / 1024  # float16's own
  x = np.concatenate([multiples, [7, -7, 0]]) * scales[:, None]
  codes, found, _, _ = quantize(x.astype(np.float32), 'int4_b32')
  np.testing.assert_array_equal(found[:, 0, 0], scales)
  np.testing.assert_array_equal(
    codes[:, :29], np.broadcast_to(np.round(multiples), (5_000, 29))
  )


@pytest.mark.parametrize('length', [1, 31, 33, 95])
@pytest.mark.parametrize('name', ['mxfp4', 'int4_b32'])
def test_a_last_block_may_be_shorter(name, length):
  x = values()[18:22, :length]
  codes, scales, found, _ = quantize(x, name)
  expected_codes, expected_scales, expected = reference(x, name)
  assert scales.shape == (4, 1, -(-length // 32))
  assert_same_bits(scales[:, 0], expected_scales)
  assert_same_bits(codes, expected_codes)
  assert_same_bits(found, expected)


def test_each_group_has_blocks_of_its_own():
  x = values()[18:22, :120]
  _, scales, found, _ = quantize(x, 'mxfp4', groups=3)
  assert scales.shape == (4, 3, 2)
  parts = [reference(part, 'mxfp4')[2] for part in np.split(x, 3, axis=1)]
  assert_same_bits(found, np.concatenate(parts, axis=1))


@pytest.mark.parametrize('axis', [0, 1, 2])
def test_blocks_lie_along_any_axis(axis):
  x = values()[10:30].reshape(20, 64, 4)
  found = quantize(x, 'mxfp6_e2m3', axis)[2]
  expected = reference(np.moveaxis(x, axis, -1), 'mxfp6_e2m3')[2]
  assert_same_bits(found, np.moveaxis(expected, -1, axis))


# JAX and Qwix round the scale of an MX block up, so that its largest value does not
# saturate; the specification rounds it down. They differ where that value is beyond
# the largest significand of the element, and there by one power of two.


def assert_rounded_up(x, name, codes, scales, their_codes, their_scales):
  size, element = find_format(name).block.size, find_format(name).element
  absmax = np.abs(blocks_of(x, size)).max(axis=-1)
  significand = lambda x: 2 * np.frexp(x)[0]  # noqa: E731
  above = significand(absmax) > significand(references.largest(element))
  np.testing.assert_array_equal(their_scales, np.where(above, 2, 1) * scales)
  equal = np.repeat(~above, size, axis=-1)
  assert 0.3 < equal.mean() < 0.95
  assert_same_bits(codes[equal], their_codes[equal])


def test_mxfp8_is_jaxs_but_for_the_rounding_of_scales():
  x = np.delete(values(), 3, axis=0)  # zeros: their scale is the lowest of all
  config = jax.nn.get_scaled_dot_general_config('mxfp8')
  their_codes, their_scales = jax_blocks.quantize(x[:, None], config)
  codes, scales, _, _ = quantize(x, 'mxfp8_e4m3')
  assert_rounded_up(
    x, 'mxfp8_e4m3', codes, scales[:, 0],
    np.asarray(their_codes[:, 0], np.float32), np.asarray(their_scales[:, 0], float),
  )  # fmt: skip


@pytest.mark.parametrize(
  ('name', 'theirs'), [('mxfp8_e4m3', 'mxfp8'), ('mxfp4', 'mxfp4')]
)
def test_mx_is_qwixs_but_for_the_rounding_of_scales(name, theirs):
  # Qwix takes 1 for the scale of blocks below 2^-63.
  x = np.delete(values()[10:], 3, axis=0)
  tiled = {'channelwise_axes': (0,), 'tiled_axes': {1: 32}}
  array = qwix.quantize(jnp.asarray(x), theirs, **tiled)
  codes, scales, _, _ = quantize(x, name)
  assert_rounded_up(
    x, name, codes, scales[:, 0],
    np.asarray(array.qvalue, np.float32), np.asarray(array.scale),
  )  # fmt: skip


def test_nvfp4_is_jaxs():
  x = values()[18:24]
  codes, scales, found, tensor_scale = quantize(x, 'nvfp4')
  assert tensor_scale == np.abs(x).max() / np.float32(448 * 6)
  # JAX divides by the scale of the tensor, where we multiply with its inverse.
  scaled = x * (np.float32(1) / tensor_scale)
  config = jax.nn.get_scaled_dot_general_config('nvfp4')
  their_codes, their_scales = jax_blocks.quantize(scaled[:, None], config)
  their_scales = np.asarray(their_scales[:, 0], np.float32)
  assert_same_bits(scales[:, 0], their_scales)
  present = np.repeat(their_scales > 0, 16, axis=-1)  # else JAX divides by zero
  assert 0.5 < present.mean() < 1
  their_codes = np.asarray(their_codes[:, 0], np.float32)
  assert_same_bits(codes[present], their_codes[present])
  assert not found[~present].any()
  expected = their_codes * np.repeat(their_scales, 16, axis=-1) * tensor_scale
  assert_same_bits(found[present], expected[present])


def test_nvfp4_is_qwixs_which_has_no_scale_of_the_tensor():
  x = values()[18:22]
  x = x / np.abs(x).max(axis=-1, keepdims=True) * np.float32(2000)
  tiled = {'channelwise_axes': (0,), 'tiled_axes': {1: 16}}
  array = qwix.quantize(jnp.asarray(x), 'nvfp4', **tiled)
  codes, scales, _, tensor_scale = quantize(x, 'nvfp4', absmax=448 * 6)
  assert tensor_scale == 1
  present = scales[:, 0] > 0  # Qwix divides by those that round to zero
  assert_same_bits(scales[:, 0][present], np.asarray(array.scale)[present])
  present = np.repeat(present, 16, axis=-1)
  assert_same_bits(codes[present], np.asarray(array.qvalue, np.float32)[present])


@pytest.mark.parametrize('name', formats.BLOCK_NAMES)
def test_zeros_subnormals_and_infinities(name):
  rows = np.float32([[0, -0.0], [1e-41, -1e-45], [np.inf, 1], [-np.inf, 0]])
  codes, scales, found, tensor_scale = quantize(np.repeat(rows, 64, 1), name, absmax=1)
  assert np.isfinite(scales).all() and np.isfinite(codes).all()
  assert not found[:2].any()  # a chip's arithmetic has no subnormals
  largest = references.largest(find_format(name).element)
  np.testing.assert_array_equal(codes[2:, :64], [[largest] * 64, [-largest] * 64])
  assert (scales[2:, 0, 0] == scales.max()).all()


@pytest.mark.parametrize('name', formats.NAMES)
def test_formats_without_blocks_are_the_same_in_a_table_with_blocks(name):
  x = values()[18:22]
  statistics = np.float32([np.mean(x**2), np.abs(x).max()])
  alone = calibration.calibrate(formats.get_format(name), *statistics)
  row = jax.tree.map(lambda field: field[0], formats.stack((name, 'mxfp4', 'nvfp4')))
  quantizer = _calibrate(1, 1)(x, row, *statistics)
  assert_same_bits(quantizer.codes(x), alone.codes(x))
  assert_same_bits(quantizer.values(x), alone.values(x))
  np.testing.assert_array_equal(quantizer.inside(x), alone.inside(x))


@pytest.mark.parametrize('length', [60, 95, 256])
@pytest.mark.parametrize('name', ['mxfp4', 'nvfp4', 'int4_b32', 'int3_b7', 'bf16'])
def test_tpus_compute_the_same_bits_without_splitting_the_axis(
  name, length, monkeypatch
):
  # Scales with mantissas and without; the last unit and the last block may be shorter.
  table = ('mxfp4', 'nvfp4', 'int4_b32', 'e5m2_b48_bf16', 'bf16')
  if name == 'int3_b7':
    table = ('int3_b7', 'int8_b21')
  row = jax.tree.map(lambda field: field[table.index(name)], formats.stack(table))
  x = values()[18:22, :length].copy()
  x[1, 20], x[2, :20], x[3, 5] = np.inf, 0, np.nan

  @jax.jit
  def found(x):
    mean_square, absmax = np.float32(1e6), np.float32(1e5)
    quantizer = calibration.calibrate_blocks(x, row, mean_square, absmax, 'rms', 1)
    scales = quantizer.blocks.of_units
    return scales, quantizer.codes(x), quantizer.multiplicands(x)

  split = found(x)
  monkeypatch.setattr(
    jax.lax, 'platform_dependent', lambda *arrays, tpu, default: tpu(*arrays)
  )
  found.clear_cache()
  for whole, expected in zip(found(x), split, strict=True):
    assert_same_bits(whole, expected)


def test_one_trace_serves_all_formats_and_sizes():
  names = ('mxfp4', 'nvfp4', 'int4_b64', 'mxint8', 'int4', 'bf16', 'e5m2_b48_bf16')
  table, traces, x = formats.stack(names), 0, values()[18:22]

  @jax.jit
  def found(format):
    nonlocal traces
    traces += 1
    quantizer = calibration.calibrate_blocks(
      x, format, np.mean(x**2), np.abs(x).max(), 'rms', 1
    )
    return quantizer.values(x)

  for row, name in enumerate(names):
    actual = found(jax.tree.map(lambda field: field[row], table))  # noqa: B023
    if find_format(name).block:
      assert_same_bits(actual, quantize(x, name)[2])
  assert traces == 1


def test_bfloat16_holds_codes_times_scales():
  # So that products of MX and NVFP4 are exact in a matrix unit for bfloat16.
  for name in (*MX_NAMES, 'nvfp4'):
    codes, scales, _, _ = quantize(values()[18:22], name)
    size = find_format(name).block.size
    products = codes * np.repeat(scales[:, 0], size, axis=-1)
    assert_same_bits(references.cast(products, 'bf16'), products)
