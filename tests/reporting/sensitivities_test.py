"""Sensitivities in a report: the map, the words, and what is no sensitivity."""

from made_up_runs import OPTIONS, write_run
from matplotlib import colors
import numpy as np
import pytest

from fliqs_jax.errors import ConfigError
from fliqs_jax.reporting import figure_style, sensitivities
from fliqs_jax.reporting.front_figure import lost_quality
from fliqs_jax.reporting.recorded_run import read_run
from fliqs_jax.reporting.sensitivity_figure import sensitivity_map, strength

LOSSES = {
  'a': dict(zip(OPTIONS, (0.5, 0.05, 0.005, 0.0))),
  'b': dict(zip(OPTIONS, (0.25, 0.0, -0.1, 0.0))),
  'c': dict(zip(OPTIONS, (0.125, 0.0, 0.0, 0.0))),
  'd': dict(zip(OPTIONS, (0.125, 0.0, 0.0, 0.0))),
}


def test_words_name_the_decisions_that_lose_most(tmp_path):
  run = read_run(write_run(tmp_path / 'run', list('abcd'), sensitivities=LOSSES))
  run.result['config']['reward']['quality'] = 'minus_loss'
  assert sensitivities.words(run.result) == (
    'Most sensitive, by increase of the loss: a (0.5 in int2), b (0.25 in int2), '
    'd (0.125 in int2); together 88% of all at their worst.'
  )
  run.result['eval']['quality'] = 1.0
  assert 'by loss of quality: ' in sensitivities.words(run.result)
  nothing = {'a': dict.fromkeys(OPTIONS, 0.0)}
  assert sensitivities.words(run.result | {'sensitivities': nothing}) == (
    'No format of any layer loses anything by itself.'
  )
  assert sensitivities.words(run.result | {'sensitivities': {}}) == ''


@pytest.mark.parametrize(
  'loss, expected', [(0.5, 1), (0.05, 2 / 3), (0.0005, 0), (1e-9, 0), (0, 0), (-1, 0)]
)
def test_three_decades_have_a_colour(loss, expected):
  assert strength(loss, 0.5) == pytest.approx(expected, abs=1e-9)
  assert strength(loss, 0.0) == 0


@pytest.mark.parametrize('width', [figure_style.WIDE, figure_style.NARROW])
def test_the_map_has_a_cell_for_each_format_and_a_dot_for_the_one_found(width):
  names = [f'layer{i}' for i in range(60)]
  rows = [
    {'name': name, 'options': ['int2', 'int8'], 'losses': [1.0, 10.0**-i]}
    for i, name in enumerate(names)
  ]
  figure = sensitivity_map(rows, dict.fromkeys(names, 'int8'), width)
  drawn, cells, dots = [], [], []
  for axes in figure.axes:
    labels = [label.get_text() for label in axes.get_xticklabels()]
    drawn += labels
    image = axes.images[0].get_array()
    assert tuple(image[0, 0, :3]) == colors.to_rgb(figure_style.PALETTE['accent'])
    cells += [*image[:, : len(labels), 3].T]
    dots += [float(line.get_ydata()[0]) for line in axes.lines]
  assert drawn == names and dots == [1.0] * 60
  expected = [[1, max(1 - i / 3, 0)] for i in range(60)]
  np.testing.assert_allclose(cells, expected, atol=1e-9)


def test_what_is_no_sensitivity_is_damage(tmp_path):
  folder = write_run(tmp_path / 'run', ['a'], sensitivities={'a': {'int2': 'much'}})
  with pytest.raises(ConfigError, match='is damaged: expected numbers by format'):
    read_run(folder)


POINT = {'cost': 1.0, 'lost': 0.5, 'within': True, 'chosen': True}


@pytest.mark.parametrize('width', [figure_style.WIDE, figure_style.NARROW])
def test_a_front_is_drawn_around_its_limit_with_a_ring_for_what_was_chosen(width):
  dear = POINT | {'cost': 8.0, 'lost': -0.25, 'chosen': False}
  cheap = POINT | {'cost': 0.5, 'lost': 75.0, 'within': False, 'chosen': False}
  axes = lost_quality([cheap, POINT, dear], 1.0, 'GBOPs', 'points', width).axes[0]
  rings = [line for line in axes.lines if line.get_fillstyle() == 'none']
  assert [(*ring.get_xdata(), *ring.get_ydata()) for ring in rings] == [(1.0, 0.5)]
  assert axes.get_ylim() == (-0.55, 4.0) and axes.get_xscale() == 'log'


@pytest.mark.parametrize('front', [5, [5], [POINT | {'lost': 'much'}]])
def test_what_is_no_front_is_damage(tmp_path, front):
  folder = write_run(tmp_path / 'run', ['a'], front=front)
  with pytest.raises(ConfigError, match='is damaged: it has no usable .*front'):
    read_run(folder)
