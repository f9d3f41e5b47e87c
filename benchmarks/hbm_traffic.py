"""Bytes that a program compiled for a TPU moves to and from HBM, read from its text.

XLA's own figure, `cost_analysis()['bytes accessed']`, counts an array that is copied to
the chip's vector memory ahead of its use more than once: in the copy, and when it is
used.
"""

import math
import re

# Arrays with this in their layout are in the vector memory.
_VECTOR_MEMORY = 'S(1)'
_BITS = {'pred': 8}
_ARRAY = re.compile(r'\b(pred|[a-z]+\d+)(?:[a-z]\w*)?\[([\d,]*)\](\{[^}]*\})?')
_INSTRUCTION = re.compile(r'\s+(?:ROOT )?(%\S+) = (.*?) ([\w-]+)\((.*)')
_OPERAND = re.compile(r'%[\w.-]+')
# What moves nothing itself: names of parts of other results, and ends of copies.
_STILL = {
    'parameter', 'get-tuple-element', 'tuple', 'bitcast', 'constant', 'custom-call',
    'copy-done', 'slice-done', 'all-reduce-start', 'all-reduce-done',
}  # fmt: skip


def hbm_bytes(program: str) -> int:
  """Returns the bytes that the entry computation reads from HBM and writes to it.

  An instruction reads its operands whole. Loops are not looked into.

  Args:
    program: a compiled HLO module as text.
  """
  entry = program[program.index('\nENTRY ') :]
  shapes, total = {}, 0
  for line in entry.splitlines():
    if not (found := _INSTRUCTION.match(line)):
      continue
    name, shape, kind, rest = found.groups()
    shapes[name] = shape
    if kind in _STILL:
      continue
    if kind in ('copy-start', 'slice-start'):
      total += _of_copy(kind, shape)
      continue
    operands = _OPERAND.findall(rest.partition('), ')[0])
    total += sum(_in_hbm(s) for s in (shape, *(shapes.get(o, '') for o in operands)))
  return total


def _of_copy(kind, shape):
  """A copy's result names its ends: (to, from, ...), or ((from), to, ...) of a part."""
  first, second = list(_ARRAY.finditer(shape))[:2]
  moved = _num_bytes(second)
  ends = first[0] + second[0]
  return moved * (2 - ends.count(_VECTOR_MEMORY))


def _in_hbm(shape):
  arrays = _ARRAY.finditer(shape)
  return sum(_num_bytes(array) for array in arrays if _VECTOR_MEMORY not in array[0])


def _num_bytes(array):
  dtype, dimensions, _ = array.groups()
  bits = _BITS.get(dtype) or int(re.sub(r'\D', '', dtype))
  return math.prod(map(int, filter(None, dimensions.split(',')))) * bits // 8
