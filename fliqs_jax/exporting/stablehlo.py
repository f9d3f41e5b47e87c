"""The whole network, weights inside, as one StableHLO program that jax alone runs."""

import pathlib

import jax
from jax import export
import numpy as np

from fliqs_jax.exporting import deployment as deployments
from fliqs_jax.exporting import folding, loading, native
from fliqs_jax.exporting.deployment import Deployment
from fliqs_jax.exporting.parameters import QuantizedLayer

FILE = 'model.stablehlo'
PACKAGES = ()
TAKES_PAIRS = True
FOLDS = True
LOADER = 'load_stablehlo.py'
PLATFORMS = ('cpu', 'cuda', 'tpu')


def refused(layer: QuantizedLayer) -> str | None:
  """Returns why a layer cannot be written; every format can."""
  del layer


def write(deployment: Deployment, folder: pathlib.Path) -> dict[str, int]:
  """Writes the network for a batch of any size, and returns what to report of it.

  Raises:
    ConfigError: where it cannot be traced so.
  """
  shapes = deployments.symbolic_shapes(deployment.inputs[0])
  compute = native.deployed_layer
  if deployment.folds_batch_norm:
    compute = folding.marked_layer
  function, report = folding.network(deployment, shapes, compute)
  exported = export.export(jax.jit(function), platforms=PLATFORMS)(*shapes)
  (folder / FILE).write_bytes(exported.serialize())
  return report


def outputs(deployment: Deployment, folder: pathlib.Path) -> list[list[np.ndarray]]:
  """Returns the outputs that a new process computes with jax alone."""
  return loading.run_batches(folder / LOADER, folder / FILE, batches=deployment.inputs)
