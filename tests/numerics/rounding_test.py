"""Rounding, bit by bit, against ml_dtypes and numpy."""

import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
from references import assert_same_bits, critical_values, random_values

from fliqs_jax.numerics import formats
from fliqs_jax.numerics.formats import get_format
from fliqs_jax.numerics.rounding import round_to_format

NARROW = tuple(n for n in formats.NAMES if n != 'float32')
NUM_HYPOTHESIS = 16  # numbers in one example, so that one shape is compiled

jitted_round = jax.jit(round_to_format)


@pytest.mark.parametrize('name', NARROW)
def test_rounding_at_every_code_and_midpoint(name):
  x = critical_values(name)
  assert_same_bits(jitted_round(x, get_format(name)), references.cast(x, name))


@pytest.mark.parametrize('name', NARROW)
def test_rounding_of_a_millionrandom_values(name):
  x = random_values(name)
  assert_same_bits(jitted_round(x, get_format(name)), references.cast(x, name))


@pytest.mark.parametrize('name', sorted({*references.ML_DTYPES} - {'bf16'}))
def test_reference_by_enumeration_equals_ml_dtypes(name):
  # So that it can be trusted for the formats of which ml_dtypes has no type.
  x = np.concatenate([critical_values(name), random_values(name, 10_000)])
  assert_same_bits(
    references.nearest_code(x, name).astype(np.float32), references.cast(x, name)
  )


def test_float32_is_the_identity_on_all_bit_patterns():
  # Every sign, exponent and upper mantissa, with lower halves at the edges and random.
  upper = np.arange(2**16, dtype=np.uint32) << 16
  random = np.random.default_rng(0).integers(0, 2**16, 12, np.uint32)
  for lower in [0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, *random]:
    x = (upper | np.uint32(lower)).view(np.float32)
    assert_same_bits(jitted_round(x, get_format('float32')), x)


@pytest.mark.parametrize('name', formats.NAMES)
def test_signed_zeros_infinities_and_nan(name):
  x = np.array([0.0, -0.0, np.inf, -np.inf, np.nan], np.float32)
  largest = np.inf if name == 'float32' else references.positive_codes(name)[-1]
  expected = np.array([0.0, -0.0, largest, -largest, np.nan], np.float32)
  assert_same_bits(jitted_round(x, get_format(name)), expected)


def test_one_trace_serves_all_formats():
  traces = 0

  @jax.jit
  def counted(x, format):
    nonlocal traces
    traces += 1
    return round_to_format(x, format)

  x = np.linspace(-9, 9, 101, dtype=np.float32)
  for name in formats.NAMES:
    assert_same_bits(counted(x, get_format(name)), references.cast(x, name))
  assert traces == 1


@pytest.mark.parametrize('name', formats.NAMES)
def test_jit_equals_eager(name):
  if name == 'float32':
    x = np.random.default_rng(0).integers(0, 2**32, 1000, np.uint32).view(np.float32)
  else:
    x = random_values(name, 500)
  with jax.disable_jit():
    eager = round_to_format(x, get_format(name))
  assert_same_bits(jitted_round(x, get_format(name)), eager)
  assert_same_bits(round_to_format(x, get_format(name)), eager)


def test_stacked_formats_through_vmap():
  x = np.random.default_rng(0).normal(0, 4, 1000).astype(np.float32)
  rounded = jax.jit(jax.vmap(round_to_format, (None, 0)))(
    x, formats.stack(formats.NAMES)
  )
  for row, name in zip(rounded, formats.NAMES, strict=True):
    assert_same_bits(row, references.cast(x, name))


def test_formats_broadcast_against_values():
  names = ('int4', 'e2m1', 'bf16', 'float32', 'e5m2')
  x = np.random.default_rng(1).normal(0, 4, (200, len(names))).astype(np.float32)
  rounded = round_to_format(x, formats.stack(names))
  for column, name in enumerate(names):
    assert_same_bits(rounded[:, column], references.cast(x[:, column], name))


@pytest.mark.parametrize('name', formats.NAMES)
@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16])
def test_shorter_dtypes_are_kept(name, dtype):
  x = jnp.asarray(np.random.default_rng(2).normal(0, 4, 1000), dtype)
  rounded = round_to_format(x, get_format(name))
  assert rounded.dtype == dtype and rounded.shape == x.shape
  reference = references.cast(np.asarray(x, np.float32), name)
  np.testing.assert_array_equal(
    np.asarray(rounded, np.float32), np.asarray(reference.astype(dtype), np.float32)
  )


def _hypothesis_case(test):
  floats = st.floats(width=32, allow_nan=False)
  values = st.lists(floats, min_size=NUM_HYPOTHESIS, max_size=NUM_HYPOTHESIS)
  settings = hypothesis.settings(max_examples=300, deadline=None, derandomize=True)
  return settings(hypothesis.given(values, st.sampled_from(formats.NAMES))(test))


@_hypothesis_case
def test_rounding_is_idempotent(values, name):
  once = jitted_round(np.float32(values), get_format(name))
  assert_same_bits(jitted_round(once, get_format(name)), once)


@_hypothesis_case
def test_rounding_is_monotone(values, name):
  rounded = np.asarray(jitted_round(np.sort(np.float32(values)), get_format(name)))
  # Not by np.diff, in which infinities cancel.
  assert (rounded[1:] >= rounded[:-1]).all()


@_hypothesis_case
def test_rounding_is_symmetric(values, name):
  x, f = np.float32(values), get_format(name)
  assert_same_bits(jitted_round(-x, f), -np.asarray(jitted_round(x, f)))


@_hypothesis_case
def test_rounding_is_to_a_code_and_none_is_nearer(values, name):
  x = np.float32(values)
  assert_same_bits(jitted_round(x, get_format(name)), references.cast(x, name))
