"""Speed of the exported network beside float32, bf16 and the uniform models.

All of them are exported and loaded as the network is, so that what is timed is what is
deployed: products in the arithmetic that `native` says, everything else as the network
has it. Models differ in their layers alone.
"""

from collections import Counter
from collections.abc import Sequence
import functools
import importlib.metadata
import logging
import pathlib
import tempfile
from typing import Any

from etils import epath
import jax
import numpy as np

from fliqs_jax.errors import ConfigError, not_among
from fliqs_jax.exporting import deployment, exporter, loading, native
from fliqs_jax.exporting.deployment import Deployment
from fliqs_jax.runs import evaluation, timing
from fliqs_jax.runs.exports import SPEED_FILE
from fliqs_jax.runs.result import write_json

FOUND = 'found'  # the network of the run, among uniform models
TARGETS = ('stablehlo', 'onnx')  # that hold the whole network

_logger = logging.getLogger(__name__)


def measure_run(
  folder: epath.Path, targets: Sequence[str], batch_sizes: Sequence[int], repeats: int
) -> dict[str, Any]:
  """Measures the network of a finished run, and returns what it writes to its folder.

  The arguments and errors are those of `measure`.

  Raises:
    ConfigError: where the folder holds no finished run, or cannot be written.
  """
  _check_targets(targets)
  deployed = deployment.make_deployment(*evaluation.finished_run(folder))
  content = measure(deployed, targets, batch_sizes, repeats)
  try:
    write_json(folder / SPEED_FILE, content)
  except OSError as error:
    raise ConfigError(
      f'cannot write to {str(folder)!r}: {error.strerror or error}'
    ) from None
  return content


def measure(
  deployed: Deployment,
  targets: Sequence[str],
  batch_sizes: Sequence[int],
  repeats: int,
) -> dict[str, Any]:
  """Returns the times of the network and of uniform models, ready for JSON.

  Args:
    deployed: the network.
    targets: of `TARGETS`.
    batch_sizes: examples of a call, the evaluation's over again where it has fewer.
    repeats: times of which the median counts.

  Raises:
    ConfigError: where a target is unknown, cannot express the network, or its packages
      are missing.
  """
  _check_targets(targets)
  for target in targets:
    exporter.check_layers(deployed, target)
  rows = []
  with tempfile.TemporaryDirectory() as folder:
    loaded = [
      (name, target, model, _load(model, target, pathlib.Path(folder, target, name)))
      for name, model in _models(deployed).items()
      for target in targets
      if not exporter.refused_layers(model, target)
    ]
    for batch_size in batch_sizes:
      rows += _timed(loaded, deployed.inputs[0], batch_size, repeats)
  return {
    'repeats': repeats,
    'device': jax.devices()[0].device_kind,
    'platform': jax.default_backend(),
    'versions': {name: importlib.metadata.version(name) for name in ('jax', 'jaxlib')},
    'rows': rows,
  }


def _check_targets(targets):
  for target in targets:
    if target not in TARGETS:
      raise ConfigError(not_among(f'no speed of target {target!r}', target, TARGETS))
    exporter.check_packages(target)


def _timed(loaded, examples, batch_size, repeats):
  """Returns a row for each loaded network, with the median of a batch's time."""
  inputs = [_of_size(a, batch_size) for a in examples]
  calls = [functools.partial(network, *inputs) for *_, network in loaded]
  times = [1e3 * seconds for seconds in timing.medians(calls, repeats)]
  rows = []
  for (name, target, model, _), ms in zip(loaded, times):
    floats = next(
      i for i, other in enumerate(loaded) if other[:2] == ('float32', target)
    )
    row = {'model': name, 'target': target, 'batch_size': batch_size, 'ms': ms}
    row['of_float32'] = ms / times[floats]
    row['arithmetic'] = _arithmetic(model) if target == 'stablehlo' else {}
    rows.append(row)
  return rows


def _arithmetic(deployed):
  return dict(Counter(map(native.arithmetic, deployed.layers.values())))


def _models(deployed):
  """Returns the network, and the uniform models of it, by name."""
  names = ('float32', 'bf16', *deployed.result['uniform_costs'])
  uniform = {name: deployed.uniform(name) for name in dict.fromkeys(names)}
  return {FOUND: deployed, **uniform}


def _load(deployed, target, folder):
  """Exports a network, and returns what its loader makes of the file."""
  _logger.info('exporting %s to %s', folder.name, target)
  folder.mkdir(parents=True)
  chosen = exporter.TARGETS[target]
  chosen.write(deployed, folder)
  loader = loading.import_loader(loading.LOADERS / chosen.loader)
  return loader.load(folder / chosen.file)


def _of_size(examples, batch_size):
  """Returns a batch of these examples, over again where they are fewer."""
  return np.resize(examples, (batch_size, *examples.shape[1:]))
