"""Latency tables: what each layer took on a device, format by format.

`python -m fliqs_jax.measure` writes such a file, for the cost model `latency_table`. A
layer is found by what it computes, not by its name, so networks may share a file.
"""

from collections.abc import Mapping, Sequence
import functools
import json
import math
from typing import Any, NamedTuple

import numpy as np

from fliqs_jax.errors import ConfigError
from fliqs_jax.layers.layer import Layer
from fliqs_jax.search.space import UNQUANTIZED

# What a layer that is not quantized is timed in.
UNQUANTIZED_FORMAT = 'bf16'

_KEY_FIELDS = ('kind', 'input_shape', 'kernel_shape', 'arguments')


class LatencyTable(NamedTuple):
  """The content of a file of latencies."""

  source: str  # the file's path, for messages
  times: Mapping[str, Mapping[str, float]]  # milliseconds an example, by key and format
  layers: Mapping[str, str]  # the key by layer path


def describe(layer: Layer) -> dict[str, Any]:
  """Returns what a layer computes on one example, ready for JSON."""
  content = {field: getattr(layer, field) for field in _KEY_FIELDS}
  content['arguments'] = dict(layer.arguments)
  return json.loads(json.dumps(content, default=str))


@functools.lru_cache(maxsize=2**16)
def layer_key(layer: Layer) -> str:
  """Returns a text that is equal for layers that compute the same."""
  return _key(describe(layer))


def layer_times(
  table: LatencyTable, layers: Sequence[Layer], names: Sequence[str]
) -> np.ndarray:
  """Returns the milliseconds of L layers in K formats for one example, float64[L, K].

  A layer that an architecture skips takes none.

  Raises:
    ConfigError: where the table lacks a layer or a format; it names the first.
  """
  return np.array([[_time(table, layer, name) for name in names] for layer in layers])


def parse_table(text: str, source: str) -> LatencyTable:
  """Returns the content of a file of latencies.

  Args:
    text: the file's.
    source: the file's path, for messages.

  Raises:
    ConfigError: where it is damaged, or no such file; one line.
  """
  try:
    content = json.loads(text)
    batch_size = _positive(content['batch_size'])
    times, layers = {}, {}
    for entry in content['entries']:
      key = _key({**entry, 'arguments': dict(entry['arguments'])})
      times[key] = {
        name: _positive(timed['ms']) / batch_size
        for name, timed in entry['formats'].items()
      }
      layers |= dict.fromkeys(entry['layers'], key)
  except (
    ArithmeticError,
    AttributeError,
    KeyError,
    RecursionError,
    TypeError,
    ValueError,
  ) as error:
    raise ConfigError(
      f'{source!r} is no latency table ({type(error).__name__}: {error}): expected '
      'a file from python -m fliqs_jax.measure'
    ) from None
  return LatencyTable(source, times, layers)


def _time(table, layer, name):
  if not any(layer.kernel_shape):  # skipped
    return 0.0
  name = UNQUANTIZED_FORMAT if name == UNQUANTIZED else name
  key = layer_key(layer)
  if key not in table.times:
    measured = table.layers.get(layer.path)
    raise ConfigError(
      f'the latency table {table.source!r} {_misfit(layer, measured)}: measure this '
      'config'
    )
  if name not in table.times[key]:
    raise ConfigError(
      f'the latency table {table.source!r} lacks the format {name} for {layer.path}, '
      f'which was measured in {", ".join(table.times[key])}: measure this config'
    )
  return table.times[key][name]


def _misfit(layer, measured):
  """Says in which fields a layer is another than the one that was measured."""
  if measured is None:
    return f'lacks the layer at {layer.path}'
  here, there = describe(layer), json.loads(measured)
  here, there = here | here.pop('arguments'), there | there.pop('arguments')
  fields = sorted(here.keys() | there.keys())
  fields = [name for name in fields if here.get(name) != there.get(name)]
  found, expected = (
    ', '.join(f'{name} {one.get(name)}' for name in fields) for one in (there, here)
  )
  return f'was measured for {found} at {layer.path}, which has {expected} here'


def _key(entry):
  return json.dumps({field: entry[field] for field in _KEY_FIELDS}, sort_keys=True)


def _positive(value):
  if not isinstance(value, int | float) or not 0 < value < math.inf:
    raise ValueError(f'expected a number above 0, found {value!r}')
  return value
