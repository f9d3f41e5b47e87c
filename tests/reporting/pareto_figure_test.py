"""The figure of a Pareto front: what is drawn, and that labels cover no other one."""

from etils import epath
from matplotlib.text import Annotation
import numpy as np
import pytest

from fliqs_jax.reporting import pareto_figure
from fliqs_jax.reporting.figure_style import NARROW, WIDE

COSTS = {'int2': 2.0, 'int3': 5.0, '0.75*int4': 6.5, 'int4': 8.7, 'int8': 35.0}


def make_points(widths):
  """Nine points for each width: five searched, four uniform."""
  return [
    {
      'kind': kind,
      'label': target,
      'group': f'width {width:g}',
      'cost': cost * (width / widths[0]) ** 2 * (0.97 if kind == 'searched' else 1),
      'error': None,
      'quality': 0.85 if target == 'int2' else 0.98,
      'on_front': target == 'int2' and kind == 'searched',
    }
    for width in widths
    for kind in ('searched', 'uniform')
    for target, cost in COSTS.items()
    if (kind, target) != ('uniform', '0.75*int4')
  ]


def labels_of(figure):
  """The labels of the points, which cover one another nowhere."""
  (axes,) = figure.axes
  labels = [child for child in axes.texts if isinstance(child, Annotation)]
  boxes = [label.get_window_extent() for label in labels]
  for i, box in enumerate(boxes):
    assert not box.count_overlaps(boxes[:i]), labels[i].get_text()
    assert 0 <= box.x0 and box.x1 <= figure.bbox.x1, labels[i].get_text()
    assert axes.bbox.y0 <= box.y0 and box.y1 <= axes.bbox.y1, labels[i].get_text()
  return [label.get_text() for label in labels]


@pytest.mark.parametrize('widths', [(0.125,), (0.125, 0.25, 0.5)])
def test_nine_and_27_points_have_their_labels(widths):
  points = make_points(widths)
  assert len(points) == 9 * len(widths)
  figure = pareto_figure.pareto(points, 'GBOPs', 'accuracy')
  (axes,) = figure.axes
  assert axes.get_xlabel() == 'cost (GBOPs, logarithmic)'
  assert axes.get_ylabel() == 'accuracy'
  (front,) = axes.lines
  expected = sorted((p['cost'], p['quality']) for p in points if p['on_front'])
  np.testing.assert_allclose(np.transpose(front.get_data()), expected)
  drawn = np.concatenate([group.get_offsets() for group in axes.collections])
  np.testing.assert_allclose(drawn, [(p['cost'], p['quality']) for p in points])
  colours = {tuple(group.get_edgecolor()[0]) for group in axes.collections}
  assert len(colours) == len(widths)
  assert labels_of(figure) == [p['label'] for p in points]


def test_the_figure_of_a_sweep_says_what_it_is_of(tmp_path, monkeypatch):
  drawn = []
  monkeypatch.setattr(pareto_figure, 'to_png', lambda f: drawn.append(f) or b'')
  shared = {
    'width': 1.0, 'cost_unit': 'GBOPs', 'model': 'resnet18', 'dataset': 'digits',
    'steps': 2000, 'seed': 3, 'standard_error': 0.01, 'on_front': True,
  }  # fmt: skip
  points = [
    {'kind': kind, 'target': 'int3', 'cost': cost, 'accuracy': 0.9, **shared}
    for kind, cost in (('searched', 0.0049), ('uniform', 0.0491))
  ]
  pareto_figure.write_sweep(epath.Path(tmp_path), points)
  (axes,) = drawn[0].axes
  assert axes.get_title('left') == 'resnet18 on digits, 2,000 steps, seed 3'
  assert axes.get_xlabel() == 'cost (MBOPs, logarithmic)'
  assert axes.get_ylabel() == 'accuracy ± standard error'
  assert labels_of(drawn[0]) == ['target int3', 'uniform int3']


def test_labels_without_a_place_are_left_out():
  points = [p | {'cost': 3.0} for p in make_points((0.125, 0.25, 0.5))]
  figure = pareto_figure.pareto(points, 's', 'quality', 'x', NARROW)
  assert 3 < len(labels_of(figure)) < len(points)
  assert figure.axes[0].get_ylabel() == 'quality'


@pytest.mark.parametrize('width', [WIDE, NARROW])
def test_an_axis_of_costs_has_several_ticks_that_stand_apart(width):
  figure = pareto_figure.pareto(make_points([1.0]), 'GBOPs', 'accuracy', 'x', width)
  figure.draw_without_rendering()
  (axes,) = figure.axes
  low, high = axes.get_xlim()
  shown = [t for t in axes.get_xticklabels() if low <= t.get_position()[0] <= high]
  boxes = [label.get_window_extent() for label in shown]
  assert len(boxes) >= 3
  assert all(a.x1 < b.x0 for a, b in zip(boxes, boxes[1:]))
