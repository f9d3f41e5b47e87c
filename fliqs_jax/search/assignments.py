"""Formats given by hand or by a finished search: a file's, for each layer of a network.

    {"conv_init": "int8",
     "stage\\\\d_.*": "int4",
     ".*": {"weights": "int3", "activations": "int4"}}

Keys are whole module paths or regexes on them; values a format for both operands or one
for each. A layer takes the value of its own path, else that of the first regex, in the
file's order, that matches its whole path. A `search_result.json` is such a file too,
whose formats are under "formats".
"""

from collections.abc import Mapping, Sequence
import json
import re
from typing import Any

from fliqs_jax.errors import ConfigError, not_among
from fliqs_jax.layers.layer import Layer
from fliqs_jax.numerics.formats import find_format
from fliqs_jax.search import options
from fliqs_jax.search.options import OPERANDS

Assignment = Mapping[str, Mapping[str, str]]  # {path or regex: {operand: format name}}

_NAMED = 3  # names of a kind in a message
EXPECTED = 'expected {"PATH OR REGEX": "FORMAT", …} or a search_result.json'


def load(content: bytes, source: str) -> dict[str, Any]:
  """Returns the JSON object in the content of a file.

  Args:
    content: the file's.
    source: the file's name, for messages.

  Raises:
    ConfigError: where there is none, or a key is given twice; one line.
  """
  try:
    loaded = json.loads(content.decode(), object_pairs_hook=_without_repetition)
  except UnicodeDecodeError:
    raise ConfigError(f'{source!r} is not a text file: {EXPECTED}') from None
  except (ValueError, RecursionError) as error:
    raise ConfigError(
      f'{source!r} is not JSON, or cut off ({error}): {EXPECTED}'
    ) from None
  if not isinstance(loaded, dict):
    raise ConfigError(f'{source!r} holds {_shorten(loaded)}: {EXPECTED}')
  return loaded


def _without_repetition(pairs):
  content = dict(pairs)
  if len(content) < len(pairs):
    keys = [key for key, _ in pairs]
    repeated = next(key for key in content if keys.count(key) > 1)
    raise ConfigError(f'the key {_shorten(repeated)} is there twice')
  return content


def parse(content: Any, source: str) -> Assignment:
  """Returns the formats in a file's content.

  Args:
    content: from JSON.
    source: the file's name, for messages.

  Raises:
    ConfigError: where it assigns no formats; one line for each problem.
  """
  if not isinstance(content, dict) or not content:
    raise ConfigError(f'{source!r} holds no formats of layers: {EXPECTED}')
  assignment, problems = {}, []
  for key, value in content.items():
    try:
      assignment[key] = _operands(value)
    except ConfigError as error:
      problems.append(f'{source!r}: layer {_shorten(key)}: {error}')
  if problems:
    raise ConfigError(*problems)
  return assignment


def _operands(value):
  both = value
  if isinstance(value, str):
    both = options.split(options.find(value))._asdict()
  if not isinstance(both, dict) or set(both) != set(OPERANDS):
    raise ConfigError(
      'expected a format name or {"weights": …, "activations": …}, found '
      f'{_shorten(value)}'
    )
  for name in both.values():
    if not isinstance(name, str):
      raise ConfigError(f'expected the name of a format, found {_shorten(name)}')
    find_format(name)
  return both


def expand(assignment: Assignment, layers: Sequence[Layer]) -> Assignment:
  """Returns the formats of each layer, `{path: {operand: format name}}`.

  Raises:
    ConfigError: where a layer is left without formats or a key matches no layer; one
      line for each problem.
  """
  paths = [layer.path for layer in layers]
  problems, regexes = [], {}
  for key in assignment:
    try:
      regexes[key] = re.compile(key)
    except (re.error, OverflowError, RecursionError) as error:
      problems.append(f'formats of {_shorten(key)}: no regular expression: {error}')
  unused = [
    key
    for key, regex in regexes.items()
    if key not in paths and not any(map(regex.fullmatch, paths))
  ]
  for key in unused[:_NAMED]:
    given = f'formats of {_shorten(key)}, which matches the whole path of no layer'
    problems.append(not_among(given, key, paths, 'a path or a regex on whole paths'))
  if unused[_NAMED:]:
    problems.append(f'{len(unused) - _NAMED} more keys match no layer')
  expanded, missing = {}, []
  for path in paths:
    matching = (key for key, regex in regexes.items() if regex.fullmatch(path))
    key = path if path in assignment else next(matching, None)
    if key is None:
      missing.append(path)
    else:
      expanded[path] = assignment[key]
  if missing:
    named = ', '.join(missing[:_NAMED]) + (' …' if missing[_NAMED:] else '')
    problems.append(
      f'{len(missing)} layer(s) without formats: {named}; a last key ".*" gives them '
      'to all that are left'
    )
  if problems:
    raise ConfigError(*problems)
  return expanded


def _shorten(value):
  text = json.dumps(value, ensure_ascii=False)
  return text if len(text) <= 80 else text[:80] + '…'
