"""Weights in one safetensors file: packed codes, scales, and all else as it is."""

import dataclasses
import functools
import json
import pathlib

import jax
import numpy as np

from fliqs_jax.exporting import codes, loading, native
from fliqs_jax.exporting.deployment import Deployment
from fliqs_jax.exporting.parameters import KERNEL, QuantizedLayer
from fliqs_jax.numerics.formats import find_format

FILE = 'model.safetensors'
PACKAGES = ('safetensors',)
LOADER = 'load_safetensors.py'
PACKING = 'codes one after the other, the first in the lowest bits of the first byte'


def refused(layer: QuantizedLayer) -> str | None:
  """Returns why a layer cannot be written; every format can."""
  del layer


def write(deployment: Deployment, folder: pathlib.Path) -> None:
  """Writes the codes of each layer, packed, with scales and other leaves."""
  # An extra of the package, which exports alone need.
  from safetensors.numpy import save

  tensors, quantized = dict(deployment.unquantized), {}
  for path, layer in deployment.layers.items():
    name = kernel_name(path)
    tensors |= _tensors(name, layer)
    quantized[name] = _describe(layer)
  metadata = {
    'quantized': json.dumps(quantized),
    'packing': PACKING,
    'model': deployment.result['model'],
  }
  arrays = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
  (folder / FILE).write_bytes(save(arrays, metadata))


def kernel_name(path: str) -> str:
  """Returns the name of a layer's weights, the path of the parameter."""
  return f'{path}/{KERNEL}' if path else KERNEL


def sizes(deployment: Deployment) -> dict[str, int]:
  """Returns the bytes of packed codes, of their scales, and of all else."""
  parts = {'codes': 0, 'scales': 0}
  for layer in deployment.layers.values():
    tensors = _tensors('', layer)
    parts['codes'] += tensors[''].nbytes
    parts['scales'] += sum(a.nbytes for name, a in tensors.items() if name)
  others = sum(a.nbytes for a in deployment.unquantized.values())
  return parts | {'unquantized': others}


def outputs(deployment: Deployment, folder: pathlib.Path) -> list[list[np.ndarray]]:
  """Returns the outputs of the network with weights that a new process has decoded."""
  decoded = loading.run(folder / LOADER, folder / FILE)
  for name, array in deployment.unquantized.items():
    if not np.array_equal(decoded.get(name), array.astype(decoded[name].dtype)):
      raise loading.Mismatch(f'{FILE} holds another {name!r}')

  def compute(layer, calibration, x, product):
    weights = decoded[kernel_name(layer.layer.path)]
    return native.decoded_layer(layer, weights, calibration, x, product)

  deployed = jax.jit(functools.partial(deployment.deployed, compute=compute))
  return [
    jax.tree.leaves(jax.device_get(deployed(*inputs))) for inputs in deployment.inputs
  ]


def _tensors(name, layer):
  format = find_format(layer.weights)
  if format.family == 'unscaled':
    return {name: layer.codes}
  if format.family == 'int':
    bits = layer.codes.astype(np.int8).view(np.uint8)
  else:
    bits = codes.to_bits(layer.codes, layer.weights)
  return {
    name: codes.pack(bits, format.bits),
    f'{name}.scale': layer.weight_scale,
  }


def _describe(layer):
  format = dataclasses.asdict(find_format(layer.weights))
  scale = layer.activation_scale
  return {
    'shape': layer.codes.shape,
    'format': {name: format[name] for name in _FORMAT_FIELDS},
    'activations': {
      'format': layer.activations,
      'scale': None if scale is None else float(scale),
    },
  }


_FORMAT_FIELDS = ('name', 'family', 'bits', 'mantissa_bits', 'exponent_min')
