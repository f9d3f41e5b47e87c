"""Export of a finished search into a folder that is there whole and verified."""

from collections.abc import Callable
import importlib.util
import json
import os
import pathlib
import shutil
import tempfile
from typing import Any, NamedTuple

import numpy as np

from fliqs_jax.errors import ConfigError, not_among
from fliqs_jax.exporting import (
  loading,
  onnx_file,
  qwix_files,
  safetensors_file,
  stablehlo,
  verification,
)
from fliqs_jax.exporting.deployment import Deployment
from fliqs_jax.exporting.parameters import QuantizedLayer
from fliqs_jax.runs.exports import REPORT_FILE


class Target(NamedTuple):
  """Kind of file that a search is exported to."""

  file: str  # the name of what is written
  loader: str  # the program of `loaders` that loads it
  packages: tuple[str, ...]  # that are needed besides those of this package
  takes_pairs: bool  # whether products of two activations can be expressed
  folds: bool  # whether it holds a network, whose batch normalisation can be folded
  # Why a layer cannot be expressed, one line; None where it can.
  refused: Callable[[QuantizedLayer], str | None]
  # Writes files into a folder, and returns what to report of them.
  write: Callable[[Deployment, pathlib.Path], dict[str, int]]
  # Leaves of what the files compute for each of its batches, loaded again.
  outputs: Callable[[Deployment, pathlib.Path], list[list[np.ndarray]]]


def _of(module):
  return Target(
    module.FILE,
    module.LOADER,
    module.PACKAGES,
    module.TAKES_PAIRS,
    module.FOLDS,
    module.refused,
    module.write,
    module.outputs,
  )


TARGETS = {
  'safetensors': _of(safetensors_file),
  'stablehlo': _of(stablehlo),
  'onnx': _of(onnx_file),
  'qwix': _of(qwix_files),
}


def export(
  deployment: Deployment, target: str, folder: os.PathLike | str
) -> dict[str, Any]:
  """Exports a network, and returns the report of how it compares with the search's.

  Args:
    deployment: the network.
    target: one of `TARGETS`.
    folder: to be made; an earlier export in it is replaced.

  Raises:
    ConfigError: where the target cannot express a layer, or the folder cannot be
      written; one line for each problem.
    Mismatch: where the export computes something else.
  """
  check(target, folder, deployment.folds_batch_norm)
  folder, chosen = pathlib.Path(folder), TARGETS[target]
  check_layers(deployment, target)
  try:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
      prefix=f'.{folder.name}.', dir=folder.parent, ignore_cleanup_errors=True
    ) as temporary:
      written = pathlib.Path(temporary, folder.name)
      written.mkdir()  # temporary folders are their owner's alone
      report = _write(deployment, target, chosen, written)
      if folder.exists():
        shutil.rmtree(folder)
      written.replace(folder)
  except OSError as error:
    raise ConfigError(
      f'cannot write to {str(folder)!r}: {error.strerror or error}'
    ) from None
  return report


def check(
  target: str, folder: os.PathLike | str, fold_batch_norm: bool = False
) -> None:
  """Checks that there is such a target, and that its export can be written there.

  Args:
    target: one of `TARGETS`.
    folder: to be made.
    fold_batch_norm: whether batch normalisation is to be folded into layers.

  Raises:
    ConfigError: where there is no such target, or something else is in the folder.
  """
  if target not in TARGETS:
    raise ConfigError(not_among(f'unknown target {target!r}', target, TARGETS))
  if fold_batch_norm and not TARGETS[target].folds:
    names = ' or '.join(name for name, chosen in TARGETS.items() if chosen.folds)
    raise ConfigError(
      f'{target} holds no network, in which batch normalisation could be folded: '
      f'expected {names}'
    )
  check_packages(target)
  folder = pathlib.Path(folder)
  taken = folder.is_file() or (folder.is_dir() and any(folder.iterdir()))
  if taken and not (folder / REPORT_FILE).is_file():
    raise ConfigError(f'{str(folder)!r} exists and is no export: expected a new folder')


def check_packages(target: str) -> None:
  """Raises ConfigError where a target needs packages that are not installed."""
  missing = [p for p in TARGETS[target].packages if not importlib.util.find_spec(p)]
  if missing:
    raise ConfigError(
      f'{target} needs {", ".join(missing)}: pip install "fliqs_jax[export]"'
    )


def check_layers(deployment: Deployment, target: str) -> None:
  """Raises ConfigError where a target cannot express a layer; one line for each."""
  if problems := refused_layers(deployment, target):
    raise ConfigError(*problems)


def refused_layers(deployment: Deployment, target: str) -> list[str]:
  """Returns a line for each layer that a target cannot express."""
  chosen = TARGETS[target]
  reasons = {path: chosen.refused(layer) for path, layer in deployment.layers.items()}
  if not chosen.takes_pairs:
    reason = f'it multiplies two activations, for which {target} export has no rule'
    reasons |= {pair.path: reason for pair in deployment.pairs}
  return [
    f'layer {path!r}: {reason}: expected another target than {target}'
    for path, reason in reasons.items()
    if reason
  ]


def _write(deployment, name, target, folder):
  written = target.write(deployment, folder)
  shutil.copy(loading.LOADERS / target.loader, folder)
  compared = verification.compare(deployment, target.outputs(deployment, folder))
  report = {
    'target': name,
    'file': target.file,
    **compared,
    **written,
    **_sizes(deployment, folder / target.file),
    'layers': {
      path: {'weights': layer.weights, 'activations': layer.activations}
      for path, layer in deployment.layers.items()
    },
  }
  (folder / REPORT_FILE).write_text(json.dumps(report, indent=2) + '\n')
  return report


def _sizes(deployment, file):
  """Returns the bytes of the file, and those of the network in wider types."""
  others = {name: a.nbytes for name, a in deployment.unquantized.items()}
  # An embedding that is looked up too is there once in a network of floats.
  kernels = sum(
    layer.codes.size for path, layer in deployment.layers.items() if path not in others
  )
  return {
    'bytes': file.stat().st_size,
    'bytes_in_float32': 4 * kernels + sum(others.values()),
    'bytes_in_bfloat16': 2 * kernels + sum(others.values()) // 2,
    'quantized_bytes': safetensors_file.sizes(deployment),
    'unquantized': others,
  }


def summary(report: dict[str, Any], folder: os.PathLike | str) -> str:
  """Returns an export in words, a few lines."""
  scores = ', '.join(f'{name} {mean:.4g}' for name, mean in report['eval'].items())
  searched = ', '.join(
    f'{name} {mean:.4g}' for name, mean in report['eval_of_the_search'].items()
  )
  folded = report.get('folded_batch_norms')
  sizes = report['bytes'], report['bytes_in_float32'], report['bytes_in_bfloat16']
  return '\n'.join([
    f'Export: {pathlib.Path(folder) / report["file"]}',
    f'  {sizes[0]:,} bytes; {sizes[1]:,} in float32, {sizes[2]:,} in bfloat16',
    f'  on {report["examples"]} examples, loaded again: {scores}',
    f'  the search itself: {searched}',
    f'  {report["agreement"]:.2%} of the predictions agree, largest difference '
    f'{report["largest_difference"]:.3g}, root mean square '
    f'{report["relative_error"]:.2g} of that of the outputs',
    *([] if folded is None else [f'  {folded} batch normalisations are folded']),
  ])  # fmt: skip
