"""Runs an exported network with jax alone.

    python load_stablehlo.py FILE INPUTS.npz OUTPUTS.npz

Arrays of one batch have names that begin with its number: 0/0, 0/1 for two inputs.
"""

import sys

import jax
from jax import export
import numpy as np


def load(path):
  """Returns the compiled network, a function of its inputs."""
  with open(path, 'rb') as file:
    return jax.jit(export.deserialize(bytearray(file.read())).call)


if __name__ == '__main__':
  network, batches, outputs = load(sys.argv[1]), {}, {}
  for name, array in np.load(sys.argv[2]).items():
    batches.setdefault(name.partition('/')[0], []).append(array)
  for batch, inputs in batches.items():
    for i, leaf in enumerate(jax.tree.leaves(network(*inputs))):
      outputs[f'{batch}/{i}'] = np.asarray(leaf, np.float32)
  np.savez(sys.argv[3], **outputs)
