"""The comparison of what was exported with what was searched."""

from collections.abc import Sequence
import math
from typing import Any

import jax
import numpy as np

from fliqs_jax.exporting.deployment import Deployment
from fliqs_jax.exporting.loading import Mismatch
from fliqs_jax.runs import evaluation
from fliqs_jax.training import steps

# What is computed differs by the order of float32 operations alone. Where that moves an
# activation across a rounding boundary, it changes by a whole step, which is rare and
# seen in few outputs. Where that changes a decision of the network, as which expert
# computes a token, the outputs of that token are others altogether.
LARGEST_ERROR = 0.02  # root mean square, in units of that of the outputs
LEAST_AGREEMENT = 0.99  # of the largest outputs; that many outputs have no larger error


def compare(
  deployment: Deployment, outputs: Sequence[Sequence[np.ndarray]]
) -> dict[str, Any]:
  """Returns how outputs compare with those of the searched network, ready for JSON.

  Args:
    deployment: what was exported.
    outputs: the leaves of what the export computes for each of its batches of inputs.

  Raises:
    Mismatch: where the difference is beyond the bounds.
  """
  searched = jax.jit(deployment.searched)
  expected = [jax.device_get(searched(*inputs)) for inputs in deployment.inputs]
  structure = jax.tree.structure(expected[0])
  if any(structure.num_leaves != len(leaves) for leaves in outputs):
    raise Mismatch('the export has another number of outputs')
  outputs = [jax.tree.unflatten(structure, leaves) for leaves in outputs]
  difference, agreement = _differences(expected, outputs)
  scores = _scores(deployment, outputs)
  report = {
    'examples': scores.pop('num_examples'),
    'largest_difference': difference['largest'],
    'relative_error': difference['relative'],
    'agreement': agreement,
    'eval': scores,
    'eval_of_the_search': _without_count(_scores(deployment, expected)),
  }
  is_close = np.isfinite(difference['relative']) and (
    difference['typical'] <= LARGEST_ERROR
  )
  if not is_close or agreement < LEAST_AGREEMENT:
    raise Mismatch(
      f'the export computes something else: {LEAST_AGREEMENT:.0%} of its outputs '
      f'differ by {difference["typical"]:.2g} of their size on {report["examples"]} '
      f'examples (expected at most {LARGEST_ERROR}), and {agreement:.2%} of the '
      f'predictions agree (expected {LEAST_AGREEMENT:.0%}); nothing was written'
    )
  return report


def _differences(expected, outputs):
  trees = jax.tree.leaves(expected), jax.tree.leaves(outputs)
  pairs = [
    (np.asarray(a, np.float64), np.asarray(b, np.float64))
    for a, b in zip(*trees, strict=True)
  ]
  if any(a.shape != b.shape for a, b in pairs):
    raise Mismatch('the export has outputs of other shapes')
  # Of each prediction, those of the smallest first.
  squares = np.sort(np.concatenate([_row_sums(np.square(a - b)) for a, b in pairs]))
  size = sum(np.sum(np.square(a)) for a, _ in pairs)
  relative = lambda squares: float(
    np.sqrt(np.sum(squares) / max(size, np.finfo(np.float64).tiny))
  )
  same = [np.argmax(a, -1) == np.argmax(b, -1) for a, b in pairs if a.ndim > 1]
  difference = {
    'largest': float(max(np.max(np.abs(a - b)) for a, b in pairs)),
    'relative': relative(squares),
    'typical': relative(squares[: math.ceil(LEAST_AGREEMENT * len(squares))]),
  }
  return difference, float(np.mean(np.concatenate([s.ravel() for s in same] or [[1]])))


def _row_sums(values):
  """Returns sums over the last axis, where there is one besides that of examples."""
  return values.sum(-1).ravel() if values.ndim > 1 else values.ravel()


def _scores(deployment, outputs):
  return evaluation.means([
    jax.device_get(steps.evaluation_sums(deployment.task, batch_outputs, batch))
    for batch_outputs, batch in zip(outputs, deployment.batches)
  ])  # fmt: skip


def _without_count(scores):
  return {name: mean for name, mean in scores.items() if name != 'num_examples'}
