"""The mesh `('sample', 'data')`, and how batches and states lie on it.

Each device scans the samples of its row, and the devices of a row split the examples.
"""

import math

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np


def make_mesh(num_samples: int, devices: list[jax.Device] | None = None) -> Mesh:
  """Returns the mesh `('sample', 'data')` over all devices.

  As many devices as divide the samples are on the sample axis; the rest splits the
  examples of each sample. A process holds whole samples, or a part of one.
  """
  devices = jax.devices() if devices is None else devices
  devices = sorted(devices, key=lambda device: (device.process_index, device.id))
  num_processes = len({device.process_index for device in devices})
  samples = sample_axis_size(num_samples, len(devices), num_processes)
  return Mesh(np.asarray(devices).reshape(samples, -1), ('sample', 'data'))


def sample_axis_size(num_samples: int, num_devices: int, num_processes: int) -> int:
  """Returns the most rows of the mesh whose ends are also those of processes.

  Then what a process holds of a batch `[S, B]` is a rectangle, as JAX expects it.
  """
  local = num_devices // num_processes
  common = math.gcd(num_samples, num_devices)
  return max(
    rows
    for rows in range(1, common + 1)
    if common % rows == 0
    and (local % (num_devices // rows) == 0 or (num_devices // rows) % local == 0)
  )


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of `[S, B, ...]` batches."""
  return NamedSharding(mesh, P('sample', 'data'))


def eval_sharding(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of `[B, ...]` batches."""
  return NamedSharding(mesh, P(('sample', 'data')))


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of the train state."""
  return NamedSharding(mesh, P())
