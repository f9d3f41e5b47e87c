"""Options of a decision on formats: one format for both operands of a layer, or a pair.

A pair is written WEIGHTS:ACTIVATIONS, as `int4:int8`, which others call w4a8. A format
by itself stands for the pair of it and itself.
"""

from collections.abc import Iterable

from fliqs_jax.errors import ConfigError
from fliqs_jax.numerics import formats
from fliqs_jax.numerics.products import LayerFormats

OPERANDS = LayerFormats._fields  # weights, activations


def join(weights: str, activations: str) -> str:
  """Returns the option that gives a layer these formats."""
  return weights if weights == activations else f'{weights}:{activations}'


def split(option: str) -> LayerFormats:
  """Returns the names of the weights' and the activations' format of an option."""
  weights, _, activations = option.partition(':')
  return LayerFormats(weights, activations or weights)


def find(text: str) -> str:
  """Returns the option that a user names, `int8` for `int8:int8`.

  Raises:
    ConfigError: where it is none; one line.
  """
  names = list(map(str.strip, text.split(':')))
  if len(names) > 2 or not all(names):
    raise ConfigError(
      f'{text!r} is no pair of formats: expected WEIGHTS:ACTIVATIONS, as int4:int8'
    )
  for name in names:
    formats.find_format(name)
  return join(names[0], names[-1])


def is_option(text: str) -> bool:
  """Returns whether a text is a format or a pair of formats."""
  names = text.split(':')
  return len(names) <= 2 and all(map(formats.is_format, names))


def parse(spec: str) -> tuple[str, ...]:
  """Returns the options in a search space's name or a comma-separated list.

  Raises:
    ConfigError: where a format is unknown, an option repeated, or none is given.
  """
  if ':' not in spec:
    return formats.parse_names(spec)
  found = tuple(map(find, filter(None, map(str.strip, spec.split(',')))))
  if len(set(found)) < len(found):
    raise ConfigError(f'a pair of formats is named twice in {spec!r}')
  return found


def format_names(options: Iterable[str]) -> tuple[str, ...]:
  """Returns the formats that options consist of, each once."""
  return tuple(dict.fromkeys(name for option in options for name in split(option)))
