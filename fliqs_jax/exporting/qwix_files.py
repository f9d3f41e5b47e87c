"""Rules and quantized parameters for Qwix: a layer's rule, its codes and its scales."""

import importlib.util
import json
import pathlib
import re
import shutil
import sys
from typing import Any

import jax
import numpy as np

from fliqs_jax.errors import ConfigError
from fliqs_jax.exporting import loading, safetensors_file
from fliqs_jax.exporting.deployment import Deployment
from fliqs_jax.exporting.parameters import QuantizedLayer
from fliqs_jax.numerics.formats import find_format

FILE = safetensors_file.FILE
LOADER = 'load_qwix.py'
PACKAGES = ('qwix', *safetensors_file.PACKAGES)

_FLOATS = {'e4m3': 'float8_e4m3fn', 'e5m2': 'float8_e5m2', 'e2m1': 'float4_e2m1fn'}


def refused(layer: QuantizedLayer) -> str | None:
  """Returns why a layer cannot be written, one line; None where it can."""
  for name in (layer.weights, layer.activations):
    if find_format(name).family == 'float' and name not in _FLOATS:
      return f'Qwix has no type for {name}'
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


def write(deployment: Deployment, folder: pathlib.Path) -> None:
  """Writes the rules, as JSON and as Python, and the codes and scales.

  Raises:
    ConfigError: where there is no module that Qwix could quantize.
  """
  if deployment.plain is None:
    raise ConfigError('Qwix quantizes linen modules: expected a network of linen')
  safetensors_file.write(deployment, folder)
  shutil.copy(loading.LOADERS / safetensors_file.LOADER, folder)
  rules = [_rule(path, layer) for path, layer in deployment.layers.items()]
  rules = [rule for rule in rules if rule]
  (folder / 'rules.json').write_text(json.dumps(rules, indent=2) + '\n')
  lines = [f'  qwix.QuantizationRule({_arguments(rule)}),' for rule in rules]
  text = ['import qwix', '', 'RULES = [', *lines, ']', '']
  (folder / 'rules.py').write_text('\n'.join(text))


def outputs(deployment: Deployment, folder: pathlib.Path) -> list[list[np.ndarray]]:
  """Returns the outputs of the network in Qwix, with what was written.

  In this process, since no file holds the network.
  """
  call = deployment.arguments(*deployment.inputs[0])
  loader = import_loader(folder / LOADER)
  model, variables = loader.load(deployment.plain, folder, *call.args, **call.kwargs)

  @jax.jit
  def compute(*inputs):
    call = deployment.arguments(*inputs)
    return model.apply(variables, *call.args, **call.kwargs)

  try:
    computed = [jax.device_get(compute(*inputs)) for inputs in deployment.inputs]
  except jax.errors.JaxRuntimeError as error:
    # XLA's own limits: on CPUs it has no products of two operands of four bits.
    raise ConfigError(
      f'{jax.default_backend()} cannot compute what Qwix does with these formats, so '
      f'that it cannot be compared: expected a TPU, or formats of 8 bits '
      f'({str(error).splitlines()[0]})'
    ) from None
  return [jax.tree.leaves(batch) for batch in computed]


def import_loader(path: pathlib.Path) -> Any:
  """Returns the module of a loader, which imports another one beside it."""
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  sys.path.insert(0, str(path.parent))
  try:
    spec.loader.exec_module(module)
  finally:
    sys.path.remove(str(path.parent))
    sys.modules.pop(pathlib.Path(safetensors_file.LOADER).stem, None)
  return module


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
