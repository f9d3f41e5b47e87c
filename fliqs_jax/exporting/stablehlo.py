"""The whole network, weights inside, as one StableHLO program that jax alone runs."""

import pathlib

import jax
from jax import export
import numpy as np

from fliqs_jax.errors import ConfigError
from fliqs_jax.exporting import deployment as deployments
from fliqs_jax.exporting import loading
from fliqs_jax.exporting.deployment import Deployment
from fliqs_jax.exporting.parameters import QuantizedLayer

FILE = 'model.stablehlo'
PACKAGES = ()
TAKES_PAIRS = True
LOADER = 'load_stablehlo.py'
PLATFORMS = ('cpu', 'cuda', 'tpu')


def refused(layer: QuantizedLayer) -> str | None:
  """Returns why a layer cannot be written; every format can."""
  del layer


def write(deployment: Deployment, folder: pathlib.Path) -> None:
  """Writes the network for a batch of any size.

  Raises:
    ConfigError: where it cannot be traced so.
  """
  shapes = deployments.symbolic_shapes(deployment.inputs[0])
  function = deployments.of_any_batch(deployment.deployed, shapes)
  exported = export.export(jax.jit(function), platforms=PLATFORMS)(*shapes)
  try:
    content = exported.serialize()
  except ValueError as error:  # outputs of a type that it does not know
    raise ConfigError(f'jax.export cannot write the network: {error}') from None
  (folder / FILE).write_bytes(content)


def outputs(deployment: Deployment, folder: pathlib.Path) -> list[list[np.ndarray]]:
  """Returns the outputs that a new process computes with jax alone."""
  return loading.run_batches(folder / LOADER, folder / FILE, batches=deployment.inputs)
