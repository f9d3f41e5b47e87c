"""Loaders of exported files, run in processes of their own."""

from collections.abc import Sequence
import os
import pathlib
import subprocess
import sys
import tempfile

import numpy as np

from fliqs_jax.errors import RunError

LOADERS = pathlib.Path(__file__).parent / 'loaders'


class Mismatch(RunError):
  """Error of an export that computes something else than what was searched."""


def run(
  script: pathlib.Path, model: pathlib.Path, inputs: dict[str, np.ndarray] | None = None
) -> dict[str, np.ndarray]:
  """Returns the arrays that a loader leaves, run without this package.

  Args:
    script: called with the model, the inputs if any, and the file to write.
    model: what was exported.
    inputs: arrays by name.

  Raises:
    Mismatch: where the loader fails; its last line.
  """
  with tempfile.TemporaryDirectory() as folder:
    given, out = pathlib.Path(folder, 'inputs.npz'), pathlib.Path(folder, 'outputs.npz')
    arguments = [script, model]
    if inputs is not None:
      np.savez(given, **inputs)
      arguments.append(given)
    # Isolated: neither this package nor what a user has on the path is found by chance.
    process = subprocess.run(
      [sys.executable, '-I', *map(str, arguments), str(out)],
      capture_output=True,
      text=True,
      env=os.environ | {'JAX_PLATFORMS': 'cpu'},
    )
    if process.returncode != 0:
      reason = (process.stderr.strip().splitlines() or ['no reason given'])[-1]
      raise Mismatch(f'{model.name} cannot be loaded by {script.name}: {reason}')
    with np.load(out) as content:
      return dict(content)


def run_batches(
  script: pathlib.Path, model: pathlib.Path, batches: Sequence[Sequence[np.ndarray]]
) -> list[list[np.ndarray]]:
  """Returns the outputs of each batch that a loader computes, in a new process.

  The arguments and errors are those of `run`; inputs and outputs of batch `b` are named
  `b/0`, `b/1` and so on.
  """
  named = {
    f'{b}/{i}': array
    for b, batch in enumerate(batches)
    for i, array in enumerate(batch)
  }
  outputs = [[] for _ in batches]
  for name, array in run(script, model, named).items():
    outputs[int(name.partition('/')[0])].append(array)
  return outputs
