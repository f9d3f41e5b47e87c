"""Weights in one safetensors file: packed codes, scales, and all else as it is."""

import dataclasses
import json
import pathlib
import tempfile

from flax import traverse_util
import jax
import numpy as np

from fliqs_jax.exporting import codes, loading, native
from fliqs_jax.exporting.deployment import Deployment
from fliqs_jax.exporting.parameters import QuantizedLayer
from fliqs_jax.layers.variables import QUANT_STATS
from fliqs_jax.numerics.formats import find_format

FILE = 'model.safetensors'
PACKAGES = ('safetensors',)
TAKES_PAIRS = True
FOLDS = False
LOADER = 'load_safetensors.py'
PACKING = 'codes one after the other, the first in the lowest bits of the first byte'


def refused(layer: QuantizedLayer) -> str | None:
  """Returns why a layer cannot be written; every format can."""
  del layer


def write(deployment: Deployment, folder: pathlib.Path) -> dict[str, int]:
  """Writes the codes of each layer, packed, with scales and all other leaves."""
  # An extra of the package, which exports alone need.
  from safetensors.numpy import save

  tensors, quantized = dict(deployment.unquantized), {}
  for layer in deployment.layers.values():
    tensors |= _tensors(layer.name, layer)
    quantized[layer.name] = _describe(layer)
  metadata = {
    'quantized': json.dumps(quantized),
    'products': json.dumps(_products(deployment)),
    'packing': PACKING,
    'model': deployment.result['model'],
  }
  arrays = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
  (folder / FILE).write_bytes(save(arrays, metadata))
  return {}


def sizes(deployment: Deployment) -> dict[str, int]:
  """Returns the bytes of packed codes, of their scales, and of all else."""
  parts = dict.fromkeys(_PARTS.values(), 0)
  for layer in deployment.layers.values():
    for name, array in _tensors('', layer).items():
      parts[_PARTS[name]] += array.nbytes
  others = sum(a.nbytes for a in deployment.unquantized.values())
  return parts | {'unquantized': others}


def outputs(deployment: Deployment, folder: pathlib.Path) -> list[list[np.ndarray]]:
  """Returns the outputs that a new process computes with the weights it has decoded.

  The file holds no network, so that the process is given one without weights.
  """
  kept = deployment.unquantized

  def network(decoded, *inputs):
    def compute(layer, *args):
      return native.decoded_layer(layer, decoded[layer.name], *args)

    # The reader has no bfloat16, and makes float32 of it.
    others = {name: decoded[name].astype(array.dtype) for name, array in kept.items()}
    return deployment.deployed(*inputs, compute=compute, others=others)

  kernels = {
    layer.name: jax.ShapeDtypeStruct(layer.codes.shape, np.float32)
    for layer in deployment.layers.values()
  }
  shapes = kernels | {
    name: jax.ShapeDtypeStruct(array.shape, _decoded_dtype(array.dtype))
    for name, array in kept.items()
  }
  with tempfile.TemporaryDirectory() as programs:
    for batch, inputs in enumerate(deployment.inputs):
      exported = jax.export.export(jax.jit(network))(shapes, *inputs)
      pathlib.Path(programs, str(batch)).write_bytes(exported.serialize())
    return loading.run_batches(
      loading.LOADERS / 'check_safetensors.py',
      folder / FILE,
      pathlib.Path(programs),
      batches=deployment.inputs,
    )


def _decoded_dtype(dtype):
  return np.dtype(np.float32) if dtype.name == 'bfloat16' else dtype


# What the file holds of a layer, by what follows the name of its weights.
_PARTS = {'': 'codes', '.scale': 'scales', '.block_scale': 'block_scales'}


def _tensors(name, layer):
  format = find_format(layer.weights)
  if format.family == 'unscaled':
    return {name: layer.codes}
  if format.family == 'int':
    bits = layer.codes.astype(np.int8).view(np.uint8)
  else:
    bits = codes.to_bits(layer.codes, layer.weights)
  tensors = {
    name: codes.pack(bits, format.bits),
    f'{name}.scale': layer.weight_scale,
  }
  if layer.block_scale is not None:
    scales = layer.block_scale
    # Types of a byte that not every reader knows are bytes.
    scales = scales.view(np.uint8) if scales.itemsize == 1 else scales
    tensors[f'{name}.block_scale'] = scales
  return tensors


def _products(deployment):
  """Returns formats and statistics of the products of activations, by path."""
  kept = traverse_util.flatten_dict(deployment.variables.get(QUANT_STATS, {}), sep='/')
  return {
    pair.path: {
      'formats': deployment.result['formats'][pair.path],
      'statistics': {
        name.removeprefix(f'{pair.path}/'): _listed(value)
        for name, value in kept.items()
        if name.startswith(f'{pair.path}/')
      },
    }
    for pair in deployment.pairs
  }


def _describe(layer):
  format = find_format(layer.weights)
  about = {name: getattr(format, name) for name in _FORMAT_FIELDS}
  if format.block:
    about['block'] = {**dataclasses.asdict(format.block), 'axis': layer.block_axis}
  return {
    'shape': layer.codes.shape,
    'format': about,
    'activations': {
      'format': layer.activations,
      'scale': _listed(layer.activation_scale),
      'shared_by': layer.shared_scale,
      'statistics': {
        name: _listed(value) for name, value in layer.statistics._asdict().items()
      }
      if layer.statistics
      else None,
    },
  }


def _listed(array):
  return None if array is None else np.asarray(array, np.float64).tolist()


_FORMAT_FIELDS = ('name', 'family', 'bits', 'mantissa_bits', 'exponent_min')
