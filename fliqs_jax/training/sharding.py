"""The mesh `('sample', 'data', 'fsdp')`, and how batches and states lie on it.

Each device scans the samples of its row, and the devices of a row split the examples.
Over `fsdp` parameters are split too, their optimizer's state and their averages, as in
ZeRO (Rajbhandari et al., 2020, arXiv 1910.02054): the compiler gathers the parameters
of a layer where they are used, and scatters the sums of their gradients.
"""

import math
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

AXES = ('sample', 'data', 'fsdp')
_EXAMPLES = ('data', 'fsdp')  # the axes that split the examples of a sample


def make_mesh(
  num_samples: int, devices: list[jax.Device] | None = None, fsdp: int = 1
) -> Mesh:
  """Returns the mesh `('sample', 'data', 'fsdp')` over all devices.

  As many devices as divide the samples are on the sample axis; the rest splits the
  examples of each sample. A process holds whole samples, or a part of one.

  Args:
    num_samples: S, the samples of a step.
    devices: None for all.
    fsdp: over how many devices each parameter is split, a divisor of theirs.
  """
  devices = jax.devices() if devices is None else devices
  devices = sorted(devices, key=lambda device: (device.process_index, device.id))
  num_processes = len({device.process_index for device in devices})
  samples = sample_axis_size(num_samples, len(devices), num_processes, fsdp)
  return Mesh(np.asarray(devices).reshape(samples, -1, fsdp), AXES)


def sample_axis_size(
  num_samples: int, num_devices: int, num_processes: int, fsdp: int = 1
) -> int:
  """Returns the most rows of the mesh whose ends are also those of processes.

  Then what a process holds of a batch `[S, B]` is a rectangle, as JAX expects it.
  """
  local = num_devices // num_processes
  common = math.gcd(num_samples, num_devices // fsdp)
  return max(
    rows
    for rows in range(1, common + 1)
    if common % rows == 0
    and (local % (num_devices // rows) == 0 or (num_devices // rows) % local == 0)
  )


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of `[S, B, ...]` batches."""
  return NamedSharding(mesh, P('sample', _EXAMPLES))


def eval_sharding(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of `[B, ...]` batches."""
  return NamedSharding(mesh, P(AXES))


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of what all devices have."""
  return NamedSharding(mesh, P())


def place(batch: Any, placed: NamedSharding, whole: bool = False) -> Any:
  """Returns a batch in numpy as arrays on the devices.

  Args:
    batch: the part of it that this process's devices hold.
    placed: the sharding of its arrays.
    whole: whether it is all of the batch instead, the same in all processes.
  """
  if not whole:
    return jax.make_array_from_process_local_data(placed, batch)
  return jax.tree.map(
    lambda a: jax.make_array_from_process_local_data(placed, a, a.shape), batch
  )


def parameter_spec(array: Any, mesh: Mesh) -> P:
  """Returns how a parameter, or a gradient of it, is split over `fsdp`.

  Along the longest axis that the devices divide. Vectors are small, and whole.

  Args:
    array: anything that has a shape.
    mesh: from `make_mesh`.
  """
  size, shape = mesh.shape['fsdp'], array.shape
  axes = [axis for axis, length in enumerate(shape) if length % size == 0]
  if size == 1 or len(shape) < 2 or not axes:
    return P()
  longest = max(axes, key=lambda axis: shape[axis])
  return P(*[None] * longest, 'fsdp')


def state_sharding(state: Any, mesh: Mesh) -> Any:
  """Returns the sharding of each leaf of a train state.

  Args:
    state: a `TrainState`, of arrays or their shapes.
    mesh: from `make_mesh`.
  """
  split = lambda tree: jax.tree.map(
    lambda leaf: NamedSharding(mesh, parameter_spec(leaf, mesh)), tree
  )
  everywhere = jax.tree.map(lambda _: replicated(mesh), state)
  return everywhere.replace(
    params=split(state.params),
    opt_state=split(state.opt_state),
    averaged_params=split(state.averaged_params),
  )
