"""Latencies of a network's layers on the device at hand, in each format.

Where the device multiplies a format itself, a layer's operands are given in that type;
otherwise the operator that emulates the format is timed.
"""

from collections.abc import Callable
import functools
import importlib.metadata
import logging
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import ml_collections

from fliqs_jax.errors import ConfigError
from fliqs_jax.layers import variables
from fliqs_jax.layers.layer import Layer
from fliqs_jax.layers.variants import find_variants
from fliqs_jax.linen import operators
from fliqs_jax.numerics.formats import (
  NumericFormat,
  find_format,
  get_format,
)
from fliqs_jax.numerics.products import LayerFormats
from fliqs_jax.runs import files, network, timing
from fliqs_jax.runs.config import resolve
from fliqs_jax.runs.result import write_json
from fliqs_jax.runs.validation import validate
from fliqs_jax.search import devices, latency, options
from fliqs_jax.search.space import UNQUANTIZED

# Dispatched at once and timed together, so that a device is not waited for.
_CALLS = 10
_EMULATED = 'emulated'

_logger = logging.getLogger(__name__)


def write_latencies(
  config: ml_collections.ConfigDict, path: str, batch_size: int, repeats: int
) -> dict[str, Any]:
  """Measures a config's network, and returns what it writes for `latency_table`.

  Args:
    config: unresolved.
    path: of the file.
    batch_size: examples at a time.
    repeats: times of which the median counts.

  Raises:
    ConfigError: where the config is unusable or the file cannot be written.
  """
  config = resolve(config)
  # The table that is about to be written cannot be asked for yet.
  config.search.latency_table = config.search.latency_table or path
  problems = validate(config, 1)
  if problems:
    raise ConfigError(*problems)
  path = files.to_path(path)
  _check_writable(path)
  content = measure(config, batch_size, repeats)
  write_json(path, content)
  return content


def measure(
  config: ml_collections.ConfigDict, batch_size: int, repeats: int
) -> dict[str, Any]:
  """Returns the latencies of a config's network, ready for JSON.

  Args:
    config: resolved.
    batch_size: examples at a time.
    repeats: of which the median counts.
  """
  groups = {}
  # All that the layers can become, and those that the target is a multiple of.
  supernet = network.searched_layers(config)
  candidates = [layer for layer in find_variants(supernet).layers if layer.macs]
  for layer in (*network.discover_layers(config), *candidates):
    groups.setdefault(latency.layer_key(layer), []).append(layer)
  names = _format_names(config)
  entries = []
  for count, layers in enumerate(groups.values(), 1):
    _logger.info('layer %d/%d: %s', count, len(groups), layers[0].path)
    entries.append(
      latency.describe(layers[0])
      | {
        'layers': list(dict.fromkeys(layer.path for layer in layers)),
        'formats': _time_layer(layers[0], names, batch_size, repeats, config.dtype),
      }
    )
  return {
    'unit': 'ms',
    'batch_size': batch_size,
    'repeats': repeats,
    'dtype': config.dtype,
    'device': jax.devices()[0].device_kind,
    'platform': jax.default_backend(),
    'versions': {
      name: importlib.metadata.version(name) for name in ('fliqs_jax', 'jax', 'jaxlib')
    },
    'entries': entries,
  }


def _format_names(config):
  """Returns the formats that the layers can have, and bf16 for unquantized ones."""
  search = config.search
  named = [
    *options.parse(search.formats),
    *(name for _, name in search.pins),
    *([search.target_format] if search.target is None else []),
    *([search.cap_format] if search.cap_cost_model and search.cap is None else []),
    latency.UNQUANTIZED_FORMAT,
  ]
  return tuple(n for n in options.format_names(named) if n != UNQUANTIZED)


def _time_layer(layer, names, batch_size, repeats, dtype):
  """Returns `{format: {'ms', 'implementation'}}` of one layer."""
  keys = jax.random.split(jax.random.key(0))
  x = jax.random.normal(keys[0], (batch_size, *layer.input_shape[1:]), dtype)
  w = jax.random.normal(keys[1], layer.kernel_shape, jnp.float32)
  emulated = _emulated(layer, x, w)
  timed = {}  # format name -> (implementation, call)
  for name in names:
    timed[name] = _native(layer, name, x, w) or (
      _EMULATED,
      functools.partial(emulated, get_format(name)),
    )
  seconds = timing.medians([call for _, call in timed.values()], repeats, _CALLS)
  return {
    name: {'ms': 1e3 * median, 'implementation': implementation}
    for (name, (implementation, _)), median in zip(timed.items(), seconds)
  }


def _native(layer, name, x, w):
  """Returns the layer on operands of a type that the device multiplies, or None."""
  device = devices.find_device(jax.devices()[0].device_kind)
  if device is None:
    return None
  dtype = _dtype(devices.native_type(device, name), name)
  if find_format(name).block is None:
    accumulated = jnp.int32 if jnp.issubdtype(dtype, jnp.integer) else jnp.float32
    operation = {'conv': lax.conv_general_dilated, 'dense': lax.dot_general}[layer.kind]
    product = functools.partial(
      operation, preferred_element_type=accumulated, **dict(layer.arguments)
    )
    operands = x.astype(dtype), w.astype(dtype)
  else:
    operands = _operands_in_blocks(device, layer, name, x, w)
    if operands is None:
      return None
    product = jax.nn.scaled_matmul
  product = jax.jit(product)
  try:
    operands = jax.block_until_ready(operands)
    jax.block_until_ready(product(*operands))
  except Exception as error:  # compilers refuse in many ways what they do not support
    _logger.info('%s in %s is emulated: %s', layer.path, name, type(error).__name__)
    return None
  return jnp.dtype(dtype).name, functools.partial(product, *operands)


def _operands_in_blocks(device, layer, name, x, w):
  """Returns the operands of `jax.nn.scaled_matmul`, None where it is not the layer.

  Those of dense layers with one contracted axis and whole blocks, in formats whose
  blocks the device multiplies. Scales are 1, since values do not change the time.
  """
  format = find_format(name)
  one_axis = (((x.ndim - 1,), (0,)), ((), ()))
  length = x.shape[-1]
  if (
    not devices.is_native(device, name)
    or layer.kind != 'dense'
    or dict(layer.arguments)['dimension_numbers'] != one_axis
    or w.ndim != 2
    or length % format.block.size
  ):
    return None
  dtype = _dtype(devices.native_type(device, name), format.element)
  scale_dtype = {'e8m0': jnp.float8_e8m0fnu, 'e4m3': jnp.float8_e4m3fn}
  values = x.reshape(1, -1, length), w.T[None]
  scales = (jnp.ones((*v.shape[:2], length // format.block.size)) for v in values)
  return (
    *(v.astype(dtype) for v in values),
    *(s.astype(scale_dtype[format.block.scale]) for s in scales),
  )


def _dtype(type_name, format_name):
  if type_name == 'fp8':
    # Integers of few bits and up to four exponent bits: e4m3; five: e5m2.
    wide = find_format(format_name).exponent_bits > 4
    return jnp.float8_e5m2 if wide else jnp.float8_e4m3fn
  if type_name == 'fp6':
    wide = find_format(format_name).exponent_bits > 2
    return jnp.float6_e3m2fn if wide else jnp.float6_e2m3fn
  return {
    'int4': jnp.int4, 'fp4': jnp.float4_e2m1fn, 'int8': jnp.int8, 'bf16': jnp.bfloat16
  }[type_name]  # fmt: skip


def _emulated(layer: Layer, x, w) -> Callable[[NumericFormat], jax.Array]:
  """Returns the quantized operator, compiled once for all formats."""
  kinds = {'conv': operators.QuantizedConv, 'dense': operators.QuantizedDotGeneral}
  operator = kinds[layer.kind]()
  arguments = dict(layer.arguments)
  statistic = jnp.ones(())

  @jax.jit
  def apply(format, x, w):
    collections = {
      variables.FORMATS: {variables.LAYER_FORMATS: LayerFormats(format, format)},
      variables.QUANT_STATS: {'mean_square': statistic, 'absmax': 4 * statistic},
    }
    return operator.apply(collections, x, w, **arguments)

  return lambda format: apply(format, x, w)


def _check_writable(path):
  """Raises ConfigError where a file cannot be written, before time is spent on it."""
  if path.is_dir() or not path.parent.is_dir():
    raise ConfigError(f'--out={path}: expected a file in a folder that exists')
  probe = path.parent / f'.{path.name}.tmp'
  try:
    probe.touch()
    probe.unlink()
  except OSError as error:
    raise ConfigError(f'--out={path}: {error.strerror or error}') from None


def summary(content: dict[str, Any]) -> str:
  """Returns a line on measured latencies: how many, where and by which means.

  Formats that no layer was timed in by the device's own type are named.
  """
  implementations = {}  # by format
  for entry in content['entries']:
    for name, timed in entry['formats'].items():
      implementations.setdefault(name, set()).add(timed['implementation'])
  means = ', '.join(sorted(set().union(*implementations.values())))
  emulated = [name for name, used in implementations.items() if used == {_EMULATED}]
  if emulated:
    means += f'; emulated for lack of an operation: {", ".join(emulated)}'
  layers = len(content['entries'])
  return f'{layers} distinct layers on {content["device"]} ({means})'
