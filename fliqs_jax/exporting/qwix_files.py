"""Rules and quantized parameters for Qwix: a layer's rule, its codes and its scales."""

import json
import pathlib
import pickle
import re
import shutil
import tempfile

import jax
import numpy as np

from fliqs_jax.errors import ConfigError
from fliqs_jax.exporting import loading, safetensors_file
from fliqs_jax.exporting.deployment import Deployment
from fliqs_jax.exporting.parameters import QuantizedLayer
from fliqs_jax.layers.parameter_products import OPERATOR
from fliqs_jax.numerics.formats import find_format

FILE = safetensors_file.FILE
LOADER = 'load_qwix.py'
PACKAGES = ('qwix', 'cloudpickle', *safetensors_file.PACKAGES)
TAKES_PAIRS = False
FOLDS = False

_FLOATS = {'e4m3': 'float8_e4m3fn', 'e5m2': 'float8_e5m2', 'e2m1': 'float4_e2m1fn'}


def refused(layer: QuantizedLayer) -> str | None:
  """Returns why a layer cannot be written, one line; None where it can."""
  if name := layer.format_beyond(_FLOATS):
    return f'Qwix export has no type for {name}'
  if layer.layer.operator == OPERATOR:
    return 'it is a product of a parameter by itself, and Qwix has rules for modules'
  if layer.stack:
    return 'it is one of a stack that the network scans over'
  if layer.layer.kind not in ('conv', 'dense'):
    return f'Qwix quantizes its product, but not a layer of kind {layer.layer.kind}'
  weights, activations = map(_qwix_type, (layer.weights, layer.activations))
  if layer.layer.kind == 'conv' and weights != activations:
    return (
      f'Qwix has convolutions with both operands in one format alone, not '
      f'{layer.weights} and {layer.activations}'
    )
  if weights is None and activations is not None:
    return f'Qwix has no rule for weights in {layer.weights} alone'
  if layer.activation_scale is None:
    return 'its input sets its own scale, which Qwix does otherwise'
  return None


def write(deployment: Deployment, folder: pathlib.Path) -> dict[str, int]:
  """Writes the rules, as JSON and as Python, and the codes and scales.

  Raises:
    ConfigError: where there is no module that Qwix could quantize.
  """
  if deployment.plain is None:
    raise ConfigError('Qwix quantizes linen modules: expected a network of linen')
  report = safetensors_file.write(deployment, folder)
  shutil.copy(loading.LOADERS / safetensors_file.LOADER, folder)
  rules = [_rule(path, layer) for path, layer in deployment.layers.items()]
  rules = [rule for rule in rules if rule]
  (folder / 'rules.json').write_text(json.dumps(rules, indent=2) + '\n')
  lines = [f'  qwix.QuantizationRule({_arguments(rule)}),' for rule in rules]
  text = ['import qwix', '', 'RULES = [', *lines, ']', '']
  (folder / 'rules.py').write_text('\n'.join(text))
  return report


def outputs(deployment: Deployment, folder: pathlib.Path) -> list[list[np.ndarray]]:
  """Returns the outputs that a new process computes in Qwix with what was written.

  No file holds the network, so that the process is given the module.
  """
  # An extra of the package, which exports alone need.
  import cloudpickle

  calls = [deployment.arguments(*inputs) for inputs in deployment.inputs]
  calls = [(jax.device_get(call.args), call.kwargs) for call in calls]
  with tempfile.TemporaryDirectory() as temporary:
    pickled = pathlib.Path(temporary, 'calls.pickle')
    try:
      pickled.write_bytes(cloudpickle.dumps((deployment.plain, calls)))
    except (TypeError, pickle.PicklingError) as error:
      raise ConfigError(
        f'the network cannot be given to another process: {error}'
      ) from None
    script = loading.LOADERS / 'check_qwix.py'
    try:
      found = loading.run(script, folder / FILE, pickled, with_own_path=True)
    except loading.Mismatch as error:
      if 'JaxRuntimeError' not in str(error):
        raise
      # XLA's own limits: on CPUs it has no products of two operands of four bits.
      raise ConfigError(
        'the CPU cannot compute what Qwix does with these formats, so that nothing can '
        f'be compared: expected formats of 8 bits ({error})'
      ) from None
  return loading.by_batch(found)


def _qwix_type(name):
  """Returns Qwix's name of a format; None for those that it leaves in float."""
  format = find_format(name)
  if format.family == 'unscaled':
    return None
  return name if format.family == 'int' else _FLOATS[name]


def _rule(path, layer):
  weights, activations = map(_qwix_type, (layer.weights, layer.activations))
  if weights is None:
    return None
  rule = {'module_path': re.escape(path), 'weight_qtype': weights}
  if activations is not None:
    rule |= {'act_qtype': activations, 'act_static_scale': True}
  return rule


def _arguments(rule):
  return ', '.join(f'{name}={value!r}' for name, value in rule.items())
