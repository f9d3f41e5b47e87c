"""Runs an exported network in ONNX Runtime.

    python load_onnx.py FILE INPUTS.npz OUTPUTS.npz

Arrays of one batch have names that begin with its number: 0/0, 0/1 for two inputs.
"""

import sys

import numpy as np
import onnxruntime


def load(path):
  """Returns the network, a function of its inputs."""
  options = onnxruntime.SessionOptions()
  # Without it, sums of two products of int8 overflow 16 bits on x86 CPUs without VNNI.
  options.add_session_config_entry('session.x64quantprecision', '1')
  try:
    session = onnxruntime.InferenceSession(path, options)
    names = [node.name for node in session.get_inputs()]
  except onnxruntime.capi.onnxruntime_pybind11_state.NotImplemented:
    # It has no FP4 on CPUs; the interpreter of ONNX itself has every operation.
    from onnx.reference import ReferenceEvaluator

    session = ReferenceEvaluator(path)
    names = session.input_names
  return lambda *inputs: session.run(None, dict(zip(names, inputs)))


if __name__ == '__main__':
  network, batches, outputs = load(sys.argv[1]), {}, {}
  for name, array in np.load(sys.argv[2]).items():
    batches.setdefault(name.partition('/')[0], []).append(array)
  for batch, inputs in batches.items():
    for i, leaf in enumerate(network(*inputs)):
      outputs[f'{batch}/{i}'] = leaf
  np.savez(sys.argv[3], **outputs)
