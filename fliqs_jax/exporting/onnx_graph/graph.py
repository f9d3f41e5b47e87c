"""Nodes and constants of an ONNX graph that grows.

Tensors that are broadcast stay small as long as what reads them broadcasts too, as all
of ONNX's elementwise operations do.
bfloat16 is computed in float32, since ONNX Runtime has little of it on CPUs.
"""

from collections.abc import Callable, Hashable, Sequence
import re
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import onnx
from onnx import helper

from fliqs_jax.errors import ConfigError


class Tensor(NamedTuple):
  """A tensor of the graph, which may have a length of 1 where it is to be broadcast."""

  name: str
  shape: tuple[Any, ...]  # as it is in the graph; the batch is a symbolic dimension


class Graph:
  """Nodes and constants of a graph that grows.

  Attributes:
    nodes: in the order in which they are computed.
    constants: tensors with their values, by name.
    batch: name of int64[1], the size of the batch.
  """

  def __init__(self):
    """An empty graph."""
    self.nodes: list[onnx.NodeProto] = []
    self.constants: list[onnx.TensorProto] = []
    self._count = 0
    self._added: dict[Hashable, str] = {}
    self.batch = ''

  def name(self) -> str:
    """Returns a name that no other tensor has."""
    self._count += 1
    return f't{self._count}'

  def once(self, key: Hashable, add: Callable[[], str]) -> str:
    """Returns what `add` has added to the graph for a key, which it does once."""
    if key not in self._added:
      self._added[key] = add()
    return self._added[key]

  def node(self, operation: str, inputs: Sequence[str], **attributes: Any) -> str:
    """Adds an operation with one output, and returns that output's name."""
    (name,) = self.nodes_outputs(operation, inputs, 1, **attributes)
    return name

  def nodes_outputs(
    self, operation: str, inputs: Sequence[str], count: int, **attributes: Any
  ) -> list[str]:
    """Adds an operation with several outputs, and returns their names."""
    names = [self.name() for _ in range(count)]
    self.nodes.append(helper.make_node(operation, inputs, names, **attributes))
    return names

  def constant(self, array: np.ndarray, dtype: int | None = None) -> str:
    """Adds a constant, and returns its name.

    Args:
      array: of a type that numpy has, but for bfloat16, which becomes float32.
      dtype: of `onnx.TensorProto`, for values that are exact in it; None for the
        array's own.
    """
    name, array = self.name(), np.asarray(array)
    if dtype is None:
      array = array.astype(plain(array.dtype))
      tensor = onnx.numpy_helper.from_array(array, name)
    else:
      values = array.astype(np.float32).ravel().tolist()
      tensor = helper.make_tensor(name, dtype, array.shape, values)
    self.constants.append(tensor)
    return name

  def integers(self, values: Sequence[int]) -> str:
    """Adds a constant vector of integers, as shapes and axes are given."""
    return self.constant(np.array(values, np.int64))

  def cast(self, name: str, dtype: Any) -> str:
    """Returns a tensor in the type of a numpy dtype."""
    return self.node('Cast', [name], to=onnx_dtype(dtype))

  def reshaped(self, name: str, shape: Sequence[Any]) -> str:
    """Returns a tensor in another shape, of which one length may be unknown."""
    lengths = [-1 if unknown(length) else length for length in shape]
    if lengths.count(-1) > 1:
      raise ConfigError(f'ONNX cannot reshape to {shape}: two lengths are unknown')
    return self.node('Reshape', [name, self.integers(lengths)])

  def transposed(self, name: str, permutation: Sequence[int]) -> str:
    """Returns a tensor with its axes in another order."""
    permutation = list(map(int, permutation))
    if permutation == sorted(permutation):
      return name
    return self.node('Transpose', [name], perm=permutation)

  def sliced(self, name: str, axis: int, first: int, last: int, step: int = 1) -> str:
    """Returns a part of a tensor along one axis."""
    numbers = [self.integers([number]) for number in (first, last, axis, step)]
    return self.node('Slice', [name, *numbers])

  def shape(self, lengths: Sequence[Any]) -> str:
    """Returns the name of a shape, int64[rank], with the batch of the call in it."""
    parts = [self._length(length) for length in lengths]
    return self.node('Concat', parts, axis=0) if parts else self.integers([])

  def length(self, length: Any) -> str:
    """Returns the name of a length, int32[]."""
    return self.cast(self.reshaped(self._length(length), ()), np.int32)

  def _length(self, length):
    if not unknown(length):
      return self.integers([length])
    multiple = re.fullmatch(r'(?:(\d+)\*)?batch', str(length))
    if not multiple:
      raise ConfigError(f'ONNX export has no rule for a length of {length}')
    if not multiple[1]:
      return self.batch
    return self.node('Mul', [self.batch, self.integers([int(multiple[1])])])

  def broadcast(self, tensor: Tensor, shape: Sequence[Any]) -> str:
    """Returns the name of a tensor that has all elements of a shape."""
    if tuple(tensor.shape) == tuple(shape):
      return tensor.name
    return self.node('Expand', [tensor.name, self.shape(shape)])


def unknown(length: Any) -> bool:
  """Returns whether a length depends on the size of the batch."""
  return not isinstance(length, (int, np.integer))


def plain(dtype: Any) -> np.dtype:
  """Returns the type in which the graph computes what JAX does in `dtype`."""
  dtype = np.dtype(dtype)
  return np.dtype(np.float32) if dtype == jnp.bfloat16 else dtype


def onnx_dtype(dtype: Any) -> int:
  """Returns ONNX's number of a type."""
  return helper.np_dtype_to_tensor_dtype(plain(dtype))
