"""The quality of a run: which number, its standard error, and how they read."""

import math

import pytest

from fliqs_jax.runs import quality

LOSS = {'loss': 2.5, 'num_examples': 400}


@pytest.mark.parametrize(
  'evaluation, name, value, text',
  [
    ({'accuracy': 0.9, 'quality': 7.0}, 'accuracy', 0.9, '90.00%'),
    ({'accuracy': 0}, 'accuracy', 0, '0.00%'),
    ({'quality': -1.60944, 'perplexity': 5.0}, 'quality', -1.60944, '-1.609'),
    ({'accuracy': 90.0, 'quality': 7.0}, 'quality', 7.0, '7'),
    ({'bits_per_byte': 2.9917, 'quality': 7.0}, 'bits per byte', 2.9917, '2.992'),
    ({}, 'minus the loss', -2.5, '-2.5'),
  ],
)
def test_what_a_run_is_judged_by(evaluation, name, value, text):
  found = quality.from_evaluation({**LOSS, **evaluation})
  assert (found.name, found.value, str(found)) == (name, value, text)
  assert (found.error is None) == (name != 'accuracy')


def test_fewer_bits_per_byte_are_better():
  evaluations = ({**LOSS, 'bits_per_byte': bits} for bits in (3.0, 2.75))
  more, fewer = map(quality.from_evaluation, evaluations)
  assert fewer.merit > more.merit
  assert more.against(fewer) == '0.25 less, which is better'
  assert fewer.against(more) == '0.25 more, which is worse'


def test_a_point_has_it_under_a_key_that_is_found_again():
  for evaluation in ({'accuracy': 0.5}, {'bits_per_byte': 2.0}, {'accuracy': 90.0}, {}):
    found = quality.from_evaluation({**LOSS, **evaluation})
    key = quality.find_name({'cost': 1.0, found.key: found.value})
    assert quality.to_words(key) == found.name


def test_an_accuracy_in_percent_is_no_fraction():
  assert quality.find_name({'accuracy': 90.0, 'quality': -1.0}) == 'quality'


def test_the_standard_error_is_that_of_a_proportion():
  # sqrt(0.9 · 0.1 / 400) = 0.3 / 20.
  assert quality.from_evaluation({**LOSS, 'accuracy': 0.9}).error == pytest.approx(
    0.015
  )


@pytest.mark.parametrize(
  'name, other, words',
  [
    ('accuracy', 0.9, 'the same'),
    ('accuracy', 0.8, '10.00 points less'),
    # The standard error of the difference is sqrt(2) · 0.015 = 0.0212, about.
    ('accuracy', 0.925, '2.50 points more'),
    ('accuracy', 0.915, '1.50 points more, which is within the standard error of the '
     'difference'),
    ('quality', 1.025, '0.125 more'),
  ],
)  # fmt: skip
def test_differences_in_words(name, other, words):
  one, two = (quality.from_evaluation({**LOSS, name: value}) for value in (0.9, other))
  assert one.against(two) == words
  assert math.isclose(one.value, 0.9)


def test_what_is_lost_is_in_the_unit_that_people_say():
  of = quality.from_evaluation
  accuracies = [of({'accuracy': a, 'num_examples': 9}) for a in (0.975, 0.97)]
  assert quality.lost(*accuracies) == pytest.approx(0.5)
  assert quality.lost_to_text('accuracy', 0.5) == '0.50 points'
  bits = [of({'bits_per_byte': b, 'num_examples': 9}) for b in (2.5, 2.75)]
  assert quality.lost(*bits) == 0.25
  assert quality.lost_to_text('bits per byte', 0.25) == '0.25 in bits per byte'
