"""Decodes an exported file with NumPy alone: python load_safetensors.py FILE OUT.npz"""

import json
import sys

import numpy as np

DTYPES = {'F32': '<f4', 'F64': '<f8', 'F16': '<f2', 'U8': 'u1', 'I8': 'i1', 'BOOL': '?',
          'I32': '<i4', 'U32': '<u4', 'I64': '<i8', 'BF16': '<u2'}  # fmt: skip


def read_tensors(path):
  """Returns the tensors of a safetensors file, and its metadata."""
  content = open(path, 'rb').read()
  start = 8 + int.from_bytes(content[:8], 'little')
  header = json.loads(content[8:start])
  metadata = header.pop('__metadata__', {})
  tensors = {}
  for name, entry in header.items():
    first, last = (start + offset for offset in entry['data_offsets'])
    array = np.frombuffer(content[first:last], DTYPES[entry['dtype']])
    if entry['dtype'] == 'BF16':  # the upper half of a float32
      array = (array.astype(np.uint32) << 16).view(np.float32)
    tensors[name] = array.reshape(entry['shape'])
  return tensors, metadata


def unpack(packed, bits, count):
  """Returns codes of a few bits, the first in the lowest bits of the first byte."""
  spread = np.unpackbits(packed, count=bits * count, bitorder='little')
  return spread.reshape(count, bits) @ (1 << np.arange(bits))


def code_values(format):
  """Returns the number that each code of a format stands for."""
  bits, mantissa_bits = format['bits'], format['mantissa_bits']
  half = 1 << (bits - 1)
  codes = np.arange(2 * half)
  if format['family'] == 'int':  # two's complement
    return np.where(codes < half, codes, codes - 2 * half).astype(np.float32)
  exponent, mantissa = np.divmod(codes % half, 1 << mantissa_bits)
  significand = mantissa * 2.0**-mantissa_bits + (exponent > 0)
  power = np.maximum(exponent, 1) - 1 + format['exponent_min']
  return (np.where(codes < half, 1, -1) * significand * 2.0**power).astype(np.float32)


def block_scales(stored, block, length):
  """Returns the scale of each value along the axis of blocks."""
  if block['scale'] == 'e8m0':  # an exponent alone
    stored = 2.0 ** (stored.astype(np.float32) - 127)
  elif block['scale'] == 'e4m3':
    e4m3 = {'family': 'float', 'bits': 8, 'mantissa_bits': 3, 'exponent_min': -6}
    stored = code_values(e4m3)[stored]
  spread = np.repeat(stored.astype(np.float32), block['size'], block['axis'])
  return spread.take(range(length), block['axis'])


def decode(path):
  """Returns every tensor of an exported file by name, weights in float32."""
  tensors, metadata = read_tensors(path)
  for name, about in json.loads(metadata['quantized']).items():
    packed, shape = tensors[name], about['shape']
    format = about['format']
    if format['family'] != 'unscaled':
      codes = unpack(packed, format['bits'], int(np.prod(shape)))
      values = code_values(format)[codes].reshape(shape)
      if block := format.get('block'):
        stored = tensors.pop(f'{name}.block_scale')
        values = values * block_scales(stored, block, shape[block['axis']])
      tensors[name] = values * tensors.pop(f'{name}.scale')
  return tensors


if __name__ == '__main__':
  np.savez(sys.argv[2], **decode(sys.argv[1]))
