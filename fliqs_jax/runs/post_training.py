"""A search without training: the formats of given weights, from calibration batches.

1. The statistics of activations are measured in the unquantized network; with
   `search.smoothing` it has other parameters of the same function before, and with
   `search.rounding=reconstruction` weights are rounded to every format after.
2. Each decision is measured in each of its formats, the others unquantized. What it
   loses is its sensitivity; for an assignment, sensitivities are added.
3. The integer program takes the assignment within the budget that loses least. A
   uniform model within it that measures better is taken instead.
4. Formats are swapped as long as that measures better, but no more than
   `search.refinement_rounds` times.
5. Batch norm's statistics are estimated under it, and it is evaluated.

Formats are traced data: each of the few functions is compiled once for all of them.
"""

from collections.abc import Mapping
import logging
import time
from typing import Any, NamedTuple

from etils import epath
import numpy as np

from fliqs_jax.errors import ConfigError
from fliqs_jax.runs import (
  evaluation,
  pretrained,
  quality_budget,
  sensitivities,
  workdir,
)
from fliqs_jax.runs import result as result_lib
from fliqs_jax.runs.calibration import Calibration
from fliqs_jax.runs.checkpoints import FOLDER, Checkpoints
from fliqs_jax.runs.setup import Setup
from fliqs_jax.search.measured_swaps import Measured, refine
from fliqs_jax.search.single_changes import open_space, single_changes
from fliqs_jax.search.strategies.uniform import uniform_choices
from fliqs_jax.training import sharding
from fliqs_jax.training.train_state import TrainState

_logger = logging.getLogger(__name__)


class Found(NamedTuple):
  """Formats that a search without training found, and their qualities."""

  state: TrainState  # with the statistics of activations and of batch norm
  choices: np.ndarray  # int32[N]
  evaluated: Mapping[str, float]
  record: Mapping[str, Any]  # what its result has beside that of any run


def find(setup: Setup, folder: epath.Path) -> Found:
  """Searches the formats of a setup's weights; writes nothing.

  Args:
    setup: of the run.
    folder: the run's.

  Raises:
    ConfigError: where there are no batches, the folder holds what was trained, or no
      assignment loses as little as `search.max_quality_drop`.
    FloatingPointError: where a mean over the evaluation is not finite.
  """
  _check(folder)
  started, opened = time.monotonic(), open_space(setup.space)
  mesh = sharding.make_mesh(setup.num_samples)
  state = evaluation.initial_state(setup, mesh, setup.config.seed)
  if setup.start:
    state = pretrained.start_from(state, setup.start)
  calibration = Calibration(setup._replace(space=opened.space), mesh)
  _logger.info('Calibrating on %d examples.', calibration.num_examples)
  smoothing = setup.config.search.smoothing
  if smoothing is not None:
    _logger.info('Smoothing the channels of layers.')
    state = calibration.smooth(state, opened.unquantized, smoothing)
  state = calibration.with_activation_statistics(state, opened.unquantized)
  if setup.config.search.rounding == 'reconstruction':
    _logger.info('Rounding weights by reconstruction.')
    calibration.reconstruct_weights(state, opened.unquantized)
  losses = _sensitivities(calibration, opened, setup.space, state)
  _logger.info('Evaluating.')
  before, _ = calibration.evaluate(state, opened.unquantized)

  def evaluate(choices):
    return calibration.evaluate(state, opened.choices(choices))

  if setup.config.search.max_quality_drop is None:
    best, front = _best_measured(calibration, opened, setup, state, losses), {}
  else:
    choices, front = quality_budget.cheapest(setup, losses, evaluate, before)
    best = _measured(calibration, opened, state, losses, [choices])[0]
  choices = best.choices
  evaluated, after = evaluate(choices)
  record = {
    'sensitivities': sensitivities.by_name(setup.space, losses),
    'post_training': {
      'examples': calibration.num_examples,
      **_qualities(calibration, opened, state, best),
      'unquantized_eval': before,
    },
    **front,
  }
  _logger.info('Searched for %.0f s.', time.monotonic() - started)
  return Found(after, choices, evaluated, record)


def save(setup: Setup, found: Found, folder: epath.Path) -> dict[str, Any]:
  """Writes the checkpoint of what was found, and returns the result of the run.

  Raises:
    RunError: where it cannot be written.
  """
  placed = sharding.batch_sharding(sharding.make_mesh(setup.num_samples))
  batches = setup.data.train(setup.config.seed, placed)
  with Checkpoints(folder) as checkpoints, workdir.History(folder, 0) as history:
    checkpoints.save(found.state, batches)
    history.write_evaluation(0, found.evaluated)
  policy = np.zeros(setup.space.valid.shape)
  policy[np.arange(len(policy)), found.choices] = 1.0
  result = result_lib.make_result(setup, found.choices, policy, found.evaluated)
  return {**result, **found.record}


def _check(folder):
  """Checks that no checkpoint is newer than the one that a search would write."""
  if not (folder / FOLDER).is_dir():
    return
  with Checkpoints(folder, read_only=True) as checkpoints:
    if checkpoints.latest_step():
      raise ConfigError(
        f'workdir {str(folder)!r} holds checkpoints of a run that trained: name '
        'another for a search without training'
      )


def _sensitivities(calibration, opened, space, state):
  """Returns the quality that each option loses, float64[N, K]."""
  changes = single_changes(space)
  _logger.info('Measuring %d single changes.', len(changes))
  candidates = [opened.reference, *(opened.changed(*change) for change in changes)]
  reference, *qualities = calibration.qualities(state, candidates)
  if not np.isfinite(reference):
    raise FloatingPointError(
      f'the quality of the given weights is {reference} on the calibration batches: '
      'look for such values in the weights or in the data'
    )
  losses = np.zeros(space.valid.shape)
  for change, quality in zip(changes, qualities):
    losses[change] = reference - quality
  # A format in which the network overflows is worse than any that can be measured.
  finite = np.isfinite(losses)
  return np.where(finite, losses, 2 * np.max(losses, where=finite, initial=1.0))


def _best_measured(calibration, opened, setup, state, losses):
  """Returns the best of what was measured within the budget, a `Measured`.

  What several layers lose is not the sum of what each one loses.
  """
  problem = setup.problem
  candidates = [problem.best_choices(-losses), *uniform_choices(problem)]
  measured = _measured(calibration, opened, state, losses, candidates)
  start = max(measured, key=lambda m: np.nan_to_num(m.quality, nan=-np.inf))

  def measure(candidates):
    _logger.info('Measuring %d assignments.', len(candidates))
    return calibration.qualities(state, [opened.choices(c) for c in candidates])

  return refine(problem, measure, start, setup.config.search.refinement_rounds)


def _measured(calibration, opened, state, losses, candidates):
  """Returns a `Measured` of each of the candidates, predicted by sums of losses."""
  choices = [opened.reference, *(opened.choices(c) for c in candidates)]
  reference, *qualities = calibration.qualities(state, choices)
  return [
    Measured(c, float(quality), float(reference - losses[np.arange(len(c)), c].sum()))
    for c, quality in zip(candidates, qualities)
  ]


def _qualities(calibration, opened, state, best):
  """Returns the qualities on the calibration batches, before and after, by name."""
  (unquantized,) = calibration.qualities(state, [opened.unquantized])
  return {
    'unquantized': float(unquantized),
    'predicted': best.predicted,
    'measured': best.quality,
  }
