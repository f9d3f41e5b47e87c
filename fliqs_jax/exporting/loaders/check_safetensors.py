"""Runs a network with the weights of an exported file, decoded with NumPy alone.

    python check_safetensors.py FILE PROGRAMS INPUTS.npz OUTPUTS.npz

PROGRAMS is a folder with the network without weights, for each batch. The reader is the
one beside the file.
"""

import pathlib
import sys

import jax
from jax import export
import numpy as np

if __name__ == '__main__':
  file, programs = map(pathlib.Path, sys.argv[1:3])
  sys.path.insert(0, str(file.parent))
  from load_safetensors import decode

  weights, batches, outputs = decode(file), {}, {}
  for name, array in np.load(sys.argv[3]).items():
    batches.setdefault(name.partition('/')[0], []).append(array)
  for batch, inputs in batches.items():
    program = export.deserialize(bytearray((programs / batch).read_bytes()))
    for i, leaf in enumerate(jax.tree.leaves(program.call(weights, *inputs))):
      outputs[f'{batch}/{i}'] = np.asarray(leaf, np.float32)
  np.savez(sys.argv[4], **outputs)
