"""Loaders of exported files, run in processes of their own."""

from collections.abc import Sequence
import importlib.util
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

import numpy as np

from fliqs_jax.errors import RunError

LOADERS = pathlib.Path(__file__).parent / 'loaders'


# JAX's filter would have the last line of an error for itself.
_ENVIRONMENT = {'JAX_PLATFORMS': 'cpu', 'JAX_TRACEBACK_FILTERING': 'off'}


class Mismatch(RunError):
  """Error of an export that computes something else than what was searched."""


def run(
  script: pathlib.Path, *arguments: pathlib.Path, with_own_path: bool = False
) -> dict[str, np.ndarray]:
  """Returns the arrays that a program leaves, run in a new process on the CPU.

  Args:
    script: called with the arguments and the file to write.
    *arguments: what was exported, and what else the program takes.
    with_own_path: whether it imports what this process can; otherwise neither this
      package nor what a user has on the path is found by chance.

  Raises:
    Mismatch: where the program fails; its last line.
    OSError: where it cannot read or write a file.
  """
  path = {'PYTHONPATH': os.pathsep.join(filter(None, sys.path))}
  with tempfile.TemporaryDirectory() as folder:
    out = pathlib.Path(folder, 'outputs.npz')
    process = subprocess.run(
      [
        *(sys.executable, *([] if with_own_path else ['-I'])),
        *map(str, (script, *arguments, out)),
      ],
      capture_output=True,
      text=True,
      env=os.environ | _ENVIRONMENT | (path if with_own_path else {}),
    )
    if process.returncode != 0:
      reason = (process.stderr.strip().splitlines() or ['no reason given'])[-1]
      if reason.startswith('OSError:'):
        raise OSError(f'{script.name}: {reason}')
      raise Mismatch(f'{arguments[0].name} cannot be loaded by {script.name}: {reason}')
    with np.load(out) as content:
      return dict(content)


def run_batches(
  script: pathlib.Path,
  *arguments: pathlib.Path,
  batches: Sequence[Sequence[np.ndarray]],
) -> list[list[np.ndarray]]:
  """Returns the outputs of each batch that a program computes, in a new process.

  The program gets a file of the inputs after the arguments, which are those of `run`,
  as are the errors. Inputs and outputs of batch `b` are named `b/0`, `b/1` and so on.
  """
  named = {
    f'{b}/{i}': array
    for b, batch in enumerate(batches)
    for i, array in enumerate(batch)
  }
  with tempfile.TemporaryDirectory() as folder:
    given = pathlib.Path(folder, 'inputs.npz')
    np.savez(given, **named)
    return by_batch(run(script, *arguments, given))


def by_batch(outputs: dict[str, np.ndarray]) -> list[list[np.ndarray]]:
  """Returns the arrays of each batch, those named `b/0`, `b/1` and so on."""
  batches = {}
  for name, array in outputs.items():
    batches.setdefault(int(name.partition('/')[0]), []).append(array)
  return [batches[b] for b in sorted(batches)]


def import_loader(path: pathlib.Path) -> Any:
  """Returns the module of a loader, which may import another one beside it."""
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  known = set(sys.modules)
  sys.path.insert(0, str(path.parent))
  try:
    spec.loader.exec_module(module)
  finally:
    sys.path.remove(str(path.parent))
    for other in path.parent.glob('*.py'):
      if other.stem not in known:
        sys.modules.pop(other.stem, None)
  return module
