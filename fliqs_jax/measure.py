"""Times a network's layers on the device at hand, in each format that is searched.

    python -m fliqs_jax.measure --config=configs/resnet18.py:digits --out=latency.json

writes the file that the cost model `latency_table` reads. Where the device multiplies a
format itself, a layer's operands are given in that type; otherwise the operator that
emulates the format is timed. The file says which.
"""

from collections.abc import Callable, Sequence
import functools
import importlib.metadata
import itertools
import logging
import statistics
import time
from typing import Any

from absl import flags
from etils import epath
import jax
from jax import lax
import jax.numpy as jnp
import ml_collections

from fliqs_jax import command_line
from fliqs_jax.runs import networks
from fliqs_jax.runs import result as results
from fliqs_jax.search import devices, latency
from fliqs_jax.numerics import formats as formats_lib
from fliqs_jax.linen import operators as layers_lib
from fliqs_jax.errors import ConfigError
from fliqs_jax.runs.config import resolve, validate
from fliqs_jax.linen.discovery import Layer
from fliqs_jax.search.space import UNQUANTIZED
from fliqs_jax.layers.variants import variants

_CONFIG = command_line.define_config_flag()
_OUT = flags.DEFINE_string('out', None, 'The file to write.')
_BATCH_SIZE = flags.DEFINE_integer('batch_size', 8, 'Examples at a time.', 1)
_REPEATS = flags.DEFINE_integer('repeats', 20, 'Times of which the median counts.', 1)

# Dispatched at once and timed together, so that a device is not waited for.
_CALLS = 10
_EMULATED = 'emulated'

_logger = logging.getLogger(__name__)

Timed = Callable[[], jax.Array]


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
  supernet = networks.searched_layers(config)
  candidates = [v for layer in supernet for v in variants(layer).values if v.macs]
  for layer in (*networks.discover_layers(config), *candidates):
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
  """What the config's layers can have, and bf16, which unquantized ones count as."""
  search = config.search
  named = [
    *formats_lib.parse_names(search.formats),
    *(name for _, name in search.pins),
    *([search.target_format] if search.target is None else []),
    *([search.cap_format] if search.cap_cost_model and search.cap is None else []),
    latency.UNQUANTIZED_FORMAT,
  ]
  return tuple(name for name in dict.fromkeys(named) if name != UNQUANTIZED)


def _time_layer(layer, names, batch_size, repeats, dtype):
  """Returns `{format: {'ms', 'implementation'}}` of one layer."""
  keys = jax.random.split(jax.random.key(0))
  x = jax.random.normal(keys[0], (batch_size, *layer.input_shape[1:]), dtype)
  w = jax.random.normal(keys[1], layer.kernel_shape, jnp.float32)
  emulated = _emulated(layer, x, w)
  variants = {}  # format name -> (implementation, call)
  for name in names:
    variants[name] = _native(layer, name, x, w) or (
      _EMULATED,
      functools.partial(emulated, formats_lib.get_format(name)),
    )
  seconds = _interleaved([call for _, call in variants.values()], repeats)
  return {
    name: {'ms': 1e3 * median, 'implementation': implementation}
    for (name, (implementation, _)), median in zip(variants.items(), seconds)
  }


def _interleaved(calls: Sequence[Timed], repeats: int) -> list[float]:
  """Returns the median seconds of each call, taken in turns after a warm-up."""
  samples = [[] for _ in calls]
  for repeat in range(repeats + 1):
    for call, taken in zip(calls, samples):
      start = time.perf_counter()
      jax.block_until_ready([call() for _ in range(_CALLS)])
      if repeat > 0:
        taken.append((time.perf_counter() - start) / _CALLS)
  return [statistics.median(taken) for taken in samples]


def _native(layer, name, x, w):
  """The layer on operands of a type that the device multiplies itself, or None."""
  device = devices.find_device(jax.devices()[0].device_kind)
  if device is None:
    return None
  type_name = devices.native_type(device, name)
  dtype = _dtype(type_name, name)
  accumulated = jnp.int32 if type_name.startswith('int') else jnp.float32
  operation = {'conv': lax.conv_general_dilated, 'dense': lax.dot_general}[layer.kind]
  product = jax.jit(
    functools.partial(
      operation, preferred_element_type=accumulated, **dict(layer.arguments)
    )
  )
  try:
    operands = jax.block_until_ready((x.astype(dtype), w.astype(dtype)))
    jax.block_until_ready(product(*operands))
  except Exception as error:  # compilers refuse in many ways what they do not support
    _logger.info('%s in %s is emulated: %s', layer.path, name, type(error).__name__)
    return None
  return jnp.dtype(dtype).name, functools.partial(product, *operands)


def _dtype(type_name, format_name):
  if type_name == 'fp8':
    # Integers of few bits and up to four exponent bits: e4m3; five: e5m2.
    wide = formats_lib.get_format(format_name).exponent_max > 8
    return jnp.float8_e5m2 if wide else jnp.float8_e4m3fn
  return {
    'int4': jnp.int4, 'fp4': jnp.float4_e2m1fn, 'int8': jnp.int8, 'bf16': jnp.bfloat16
  }[type_name]  # fmt: skip


def _emulated(layer: Layer, x, w) -> Callable[[formats_lib.NumericFormat], jax.Array]:
  """The quantized operator, compiled once for all formats."""
  operators = layers_lib.QuantizedConv, layers_lib.QuantizedDotGeneral
  operator = {cls.kind: cls for cls in operators}[layer.kind]()
  arguments = dict(layer.arguments)
  statistic = jnp.ones(())

  @jax.jit
  def apply(format, x, w):
    variables = {
      layers_lib.FORMATS: {
        layers_lib.LAYER_FORMATS: layers_lib.LayerFormats(format, format)
      },
      layers_lib.QUANT_STATS: {'mean_square': statistic, 'absmax': 4 * statistic},
    }
    return operator.apply(variables, x, w, **arguments)

  return lambda format: apply(format, x, w)


def _check_writable(path):
  """Raises ConfigError where a file cannot be written, before time is spent on it."""
  if path.is_dir() or not path.parent.is_dir():
    raise ConfigError(f'--out={_OUT.value}: expected a file in a folder that exists')
  probe = path.parent / f'.{path.name}.tmp'
  try:
    probe.touch()
    probe.unlink()
  except OSError as error:
    raise ConfigError(f'--out={_OUT.value}: {error.strerror or error}') from None


def main(argv):
  """Measures the config's network and writes the table."""
  del argv
  config = resolve(_CONFIG.value)
  # The table that is about to be written cannot be asked for yet.
  config.search.latency_table = config.search.latency_table or _OUT.value
  problems = validate(config, 1)
  if problems:
    raise ConfigError(*problems)
  out = epath.Path(_OUT.value)
  _check_writable(out)
  try:
    content = measure(config, _BATCH_SIZE.value, _REPEATS.value)
  except ValueError as error:
    raise ConfigError(str(error)) from None
  results.write_json(out, content)
  counted = itertools.chain.from_iterable(
    e['formats'].values() for e in content['entries']
  )
  kinds = sorted({timed['implementation'] for timed in counted})
  print(
    f'{len(content["entries"])} distinct layers on {content["device"]} '
    f'({", ".join(kinds)}): {_OUT.value}'
  )


if __name__ == '__main__':
  command_line.run(main, required=('config', 'out'))
