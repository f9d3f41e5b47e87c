"""Health of a run: steps whose numbers are sound, and their averages."""

from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

from fliqs_jax.search.assignments import Assignment

# The metrics that are finite in a sound step.
_CHECKED = ('loss', 'gradient_norm', 'reward')


def checked_metrics(metrics: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
  """Returns those of a step's metrics that are all finite where the step is sound."""
  return {name: metrics[name] for name in _CHECKED if name in metrics}


def average(
  pending: Sequence[Mapping[str, jax.Array]],
  last_step: int,
  max_skipped_steps: int,
  formats_of: Callable[[np.ndarray], Assignment],
) -> dict[str, float]:
  """Returns the mean scalars of some steps, over those that were not skipped.

  Args:
    pending: the metrics of each step, from a search or a train step.
    last_step: how many steps the run has taken with the last of them.
    max_skipped_steps: how many steps in a row may be skipped. Where it is above 0 there
      is also `skipped_steps`, how many of these were.
    formats_of: the formats that choices int32[N] stand for.

  Raises:
    FloatingPointError: where a loss or a gradient is not finite and its step must not
      be skipped; it names the step, and the sample with its formats.
  """
  rows = jax.device_get(list(pending))
  taken = []
  for step, row in enumerate(rows, start=last_step - len(rows) + 1):
    if not _unsound(row) and not row.get('skipped_in_a_row', 0):
      taken.append(row)
    elif row.get('skipped_in_a_row', np.inf) > max_skipped_steps:
      raise FloatingPointError(_describe(row, step, formats_of))
  averaged = {
    name: float(np.mean([row[name] for row in taken]))
    for name, value in rows[0].items()
    if np.ndim(value) == 0 and name != 'skipped_in_a_row' and taken
  }
  if max_skipped_steps:
    averaged['skipped_steps'] = len(rows) - len(taken)
  return averaged


def _unsound(row):
  return [name for name, x in checked_metrics(row).items() if not np.isfinite(x)]


def _describe(row, step, formats_of):
  name = _unsound(row)[0]
  text = f'{name} is {row[name]} at step {step}'
  if 'choices' not in row:
    return text
  (samples,) = np.nonzero(~np.isfinite(row['sample_loss']))
  # A gradient may overflow though no loss does, and is known of all samples together.
  for sample in samples if samples.size else range(len(row['choices'])):
    text += f', sample {sample} ({_by_format(formats_of(row["choices"][sample]))})'
  return text


def _by_format(assignment: Mapping[str, Mapping[str, str]]) -> str:
  """Returns `int4: the layers that have it; int8: …`, weights / activations."""
  layers: dict[str, list[str]] = {}
  for path, formats in assignment.items():
    names = dict.fromkeys((formats['weights'], formats['activations']))
    layers.setdefault('/'.join(names), []).append(path)
  return '; '.join(f'{name}: {", ".join(paths)}' for name, paths in layers.items())
