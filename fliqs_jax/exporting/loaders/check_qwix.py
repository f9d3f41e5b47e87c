"""Runs a network in Qwix, with the rules and weights of an export.

    python check_qwix.py FILE CALLS.pickle OUTPUTS.npz

CALLS are the network, a Flax module, and the arguments of its calls.
"""

import pathlib
import sys

import cloudpickle
import jax
import numpy as np

if __name__ == '__main__':
  folder = pathlib.Path(sys.argv[1]).parent
  sys.path.insert(0, str(folder))
  from load_qwix import load

  model, calls = cloudpickle.loads(pathlib.Path(sys.argv[2]).read_bytes())
  args, kwargs = calls[0]
  quantized, variables = load(model, folder, *args, **kwargs)
  compute = jax.jit(lambda *args: quantized.apply(variables, *args, **kwargs))
  outputs = {
    f'{batch}/{i}': np.asarray(leaf, np.float32)
    for batch, (args, _) in enumerate(calls)
    for i, leaf in enumerate(jax.tree.leaves(compute(*args)))
  }
  np.savez(sys.argv[3], **outputs)
