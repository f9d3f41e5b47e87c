"""Figures: what is drawn, and that labels do not cover one another."""

from matplotlib.text import Annotation
import numpy as np
import pytest

from fliqs_jax import figures


def make_points(widths):
  costs = {'int2': 2.0, 'int3': 5.0, '0.75*int4': 6.5, 'int4': 8.7, 'int8': 35.0}
  return [
    {
      'kind': kind,
      'target': target,
      'width': width,
      'cost': cost * (width / widths[0]) ** 2 * (0.97 if kind == 'searched' else 1),
      'cost_unit': 'GBOPs',
      'accuracy': 0.85 if target == 'int2' else 0.98,
      'on_front': target == 'int2' and kind == 'searched',
    }
    for width in widths
    for kind in ('searched', 'uniform')
    for target, cost in costs.items()
  ]


@pytest.mark.parametrize('widths', [(0.125,), (0.125, 0.25)])
def test_pareto(widths):
  points = make_points(widths)
  figure = figures.pareto(points)
  (axes,) = figure.axes
  assert axes.get_xlabel() == 'cost (GBOPs)' and axes.get_ylabel() == 'accuracy'
  (front,) = axes.lines
  expected = sorted((p['cost'], p['accuracy']) for p in points if p['on_front'])
  np.testing.assert_allclose(np.transpose(front.get_data()), expected)
  drawn = np.concatenate([group.get_offsets() for group in axes.collections])
  np.testing.assert_allclose(
    sorted(map(tuple, drawn)), sorted((p['cost'], p['accuracy']) for p in points)
  )
  labels = [child for child in axes.texts if isinstance(child, Annotation)]
  assert [label.get_text() for label in labels] == [p['target'] for p in points]
  boxes = [label.get_window_extent() for label in labels]
  for i, box in enumerate(boxes):
    assert not box.count_overlaps(boxes[:i]), labels[i].get_text()
