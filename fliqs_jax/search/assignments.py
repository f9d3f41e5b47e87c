"""Formats given by hand or by a finished search: a file's, for each layer of a network.

    {"conv_init": "int8",
     "stage\\\\d_.*": "int4",
     ".*": {"weights": "int3", "activations": "int4"}}

Keys are whole module paths or regexes on them; values a format for both operands or one
for each. A layer takes the value of its own path, else that of the first regex, in the
file's order, that matches its whole path. A `search_result.json` is such a file too,
whose formats are under "formats".
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from fliqs_jax.numerics import formats as formats_lib
from fliqs_jax.errors import not_among
from fliqs_jax.linen.discovery import Layer
from fliqs_jax.search.space import OPERANDS

Assignment = Mapping[str, Mapping[str, str]]  # {path or regex: {operand: format name}}

# Far above the result of any network, far below what would fill the memory.
_MAX_BYTES = 2**24
_NAMED = 3  # names of a kind in a message
_EXPECTED = 'expected {"PATH OR REGEX": "FORMAT", …} or a search_result.json'


def read(spec: str) -> str | Assignment:
  """Returns what `config.formats` names: a format for all layers, or a file's.

  Raises:
    ValueError: where it is neither; one line for each problem.
  """
  if spec in formats_lib.NAMES:
    return spec
  if not epath.Path(spec).exists() and os.sep not in spec and '.' not in spec:
    formats_lib.get_format(spec)  # names the nearest format
  content = read_json(spec)
  return parse(content.get('formats', content), spec)


def read_json(path: os.PathLike | str) -> dict[str, Any]:
  """Returns the JSON object in a file.

  Raises:
    ValueError: where there is none, or a key is given twice; one line.
  """
  given = repr(str(path))
  try:
    with epath.Path(path).open('rb') as file:
      content = file.read(_MAX_BYTES + 1)
  except OSError as error:
    reason = error.strerror or type(error).__name__
    raise ValueError(f'cannot read {given}: {reason}') from None
  if len(content) > _MAX_BYTES:
    raise ValueError(f'{given} is larger than {_MAX_BYTES >> 20} MiB: {_EXPECTED}')
  try:
    content = json.loads(content.decode(), object_pairs_hook=_without_repetition)
  except UnicodeDecodeError:
    raise ValueError(f'{given} is not a text file: {_EXPECTED}') from None
  except (ValueError, RecursionError) as error:
    raise ValueError(
      f'{given} is not JSON, or cut off ({error}): {_EXPECTED}'
    ) from None
  if not isinstance(content, dict):
    raise ValueError(f'{given} holds {_shorten(content)}: {_EXPECTED}')
  return content


def _without_repetition(pairs):
  content = dict(pairs)
  if len(content) < len(pairs):
    keys = [key for key, _ in pairs]
    repeated = next(key for key in content if keys.count(key) > 1)
    raise ValueError(f'the key {_shorten(repeated)} is there twice')
  return content


def parse(content: Any, source: os.PathLike | str) -> Assignment:
  """Returns the formats in a file's content.

  Args:
    content: from JSON.
    source: the file's name, for messages.

  Raises:
    ValueError: where it assigns no formats; one line for each problem.
  """
  if not isinstance(content, dict) or not content:
    raise ValueError(f'{str(source)!r} holds no formats of layers: {_EXPECTED}')
  assignment, problems = {}, []
  for key, value in content.items():
    try:
      assignment[key] = _operands(value)
    except ValueError as error:
      problems.append(f'{str(source)!r}: layer {_shorten(key)}: {error}')
  if problems:
    raise ValueError('\n'.join(problems))
  return assignment


def _operands(value):
  both = dict.fromkeys(OPERANDS, value) if isinstance(value, str) else value
  if not isinstance(both, dict) or set(both) != set(OPERANDS):
    raise ValueError(
      'expected a format name or {"weights": …, "activations": …}, found '
      f'{_shorten(value)}'
    )
  for name in both.values():
    if not isinstance(name, str):
      raise ValueError(f'expected the name of a format, found {_shorten(name)}')
    formats_lib.get_format(name)
  return both


def expand(assignment: Assignment, layers: Sequence[Layer]) -> Assignment:
  """Returns the formats of each layer, `{path: {operand: format name}}`.

  Raises:
    ValueError: where a layer is left without formats or a key matches no layer; one
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
    raise ValueError('\n'.join(problems))
  return expanded


def _shorten(value):
  text = json.dumps(value, ensure_ascii=False)
  return text if len(text) <= 80 else text[:80] + '…'
