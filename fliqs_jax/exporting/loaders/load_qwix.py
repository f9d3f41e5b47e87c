"""Loads exported rules and weights into Qwix, for a Flax module that you have.

    model, variables = load(Network(), 'runs/digits/export/qwix', example)
    outputs = model.apply(variables, example)

Kernels become Qwix's own quantized arrays and inputs have fixed scales, so that Qwix
calibrates nothing.
"""

import json
import pathlib

import jax
import jax.numpy as jnp
from load_safetensors import code_values, read_tensors, unpack
import numpy as np
import qwix


def read_rules(folder):
  """Returns the rules of the layers."""
  rules = json.loads(pathlib.Path(folder, 'rules.json').read_text())
  return [qwix.QuantizationRule(**rule) for rule in rules]


def load(model, folder, *args, **kwargs):
  """Returns a linen module that computes in Qwix, and its variables.

  Args:
    model: the float network.
    folder: of the export.
    *args: what the network is called with, as `model.init` takes it.
    **kwargs: the same.
  """
  tensors, metadata = read_tensors(pathlib.Path(folder, 'model.safetensors'))
  quantized = qwix.quantize_model(model, qwix.PtqProvider(read_rules(folder)))
  shapes = jax.eval_shape(
    lambda key: quantized.init(key, *args, **kwargs), jax.random.key(0)
  )
  about = json.loads(metadata['quantized'])

  def fill(path, leaf):
    collection, *keys = (getattr(key, 'key', key) for key in path)
    name = '/'.join(keys)
    if not hasattr(leaf, 'how'):
      name = name if collection == 'params' else f'{collection}/{name}'
      weights = decoded(tensors, name, about[name]) if name in about else tensors[name]
      return jnp.asarray(weights, leaf.dtype)
    if name in about:
      codes = unpacked(tensors[name], about[name])
      scale = jnp.asarray(tensors[f'{name}.scale'])
      array = qwix.QArray(codes.astype(leaf.array.qvalue.dtype), scale)
      return leaf.replace(array=array.replace(qtype=leaf.array.qtype))
    kernel = '/'.join(
      [*keys[:-1], 'kernel']
    )  # of whose layer this is the input's scale
    scale = about[kernel]['activations']['scale']
    return leaf.replace(array=jnp.full(leaf.array.shape, scale, leaf.array.dtype))

  is_quantized = lambda leaf: hasattr(leaf, 'how')
  return quantized, jax.tree_util.tree_map_with_path(fill, shapes, is_leaf=is_quantized)


def unpacked(packed, about):
  """Returns the values of codes, in their shape."""
  codes = unpack(packed, about['format']['bits'], int(np.prod(about['shape'])))
  return code_values(about['format'])[codes].reshape(about['shape'])


def decoded(tensors, name, about):
  """Returns weights that Qwix has no rule for, in float32."""
  if about['format']['family'] == 'unscaled':
    return tensors[name].astype(np.float32)
  return unpacked(tensors[name], about) * tensors[f'{name}.scale']
