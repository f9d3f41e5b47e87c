"""Units of costs, against multiples written by hand."""

import math

import pytest

from fliqs_jax.reporting import units
from fliqs_jax.search.cost_models import COST_MODELS


@pytest.mark.parametrize(
  'cost, unit, text',
  [
    (0.004449, 'GBOPs', '4.449 MBOPs'),
    (0.00444912345, 'GBOPs', '4.44912 MBOPs'),
    (1810.25, 'GBOPs', '1.81025 TBOPs'),
    (116.9, 'GBOPs', '116.9 GBOPs'),
    (5.12e-7, 'GBOPs', '512 BOPs'),
    (3e-11, 'GBOPs', '0.03 BOPs'),
    (0.9999999, 'GBOPs', '1 GBOPs'),
    (0.002, 'Gbit·MACs', '2 Mbit·MACs'),
    (44_700_000.0, 'bytes', '44.7 MB'),
    (999.0, 'bytes', '999 bytes'),
    (0.25, 'ms', '250 µs'),
    (1200.0, 'ms', '1.2 s'),
    (0.004, 'joules', '0.004 joules'),
    (0.0, 'GBOPs', '0 GBOPs'),
  ],
)
def test_a_cost_has_the_multiple_that_reads_well(cost, unit, text):
  assert units.choose([cost], unit).text(cost) == text


def test_one_multiple_serves_several_costs():
  unit = units.choose([0.25, 4.0, math.inf], 'GBOPs')
  assert [unit.scale(cost) for cost in (0.25, 4.0, math.inf)] == [0.25, 4.0, math.inf]
  assert unit.name == 'GBOPs'


def test_digits_stay_where_a_product_would_change_them():
  assert 0.00010004 * 1e6 == 100.03999999999999
  assert units.choose([0.00010004], 'GBOPs').scale(0.00010004) == 100.04


def test_units_of_all_cost_models_have_multiples():
  for model in COST_MODELS.values():
    unit = units.choose([1e-6], model.unit)
    assert unit.name != model.unit or model.unit == 'bytes'
