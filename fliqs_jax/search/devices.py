"""Accelerators: peak rates by number type, and memory bandwidth, as published.

All rates are dense, of one chip or GPU. What has no published rate is left out, and the
formats that would use it run in the next wider type that the device has. Such a format,
or one with blocks whose scales the matrix unit does not apply, is *emulated*: stored,
but multiplied in the wider type.
"""

from collections.abc import Mapping, Sequence
import functools
import re
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from fliqs_jax.errors import ConfigError, not_among
from fliqs_jax.numerics.formats import Block, find_format
from fliqs_jax.search import options

# What matrix units multiply, narrowest first, and the bits that a value is stored in.
TYPE_BITS = {'int4': 4, 'fp4': 4, 'fp6': 6, 'int8': 8, 'fp8': 8, 'bf16': 16}


class Device(NamedTuple):
  """Rates and bandwidth of a device, on which its roofline depends."""

  peaks: Mapping[str, float]  # operations a second by number type; bf16 is a must
  bandwidth: float  # bytes a second between the chip and its memory
  # Types of which the matrix unit multiplies blocks, their scales included, by block.
  blocks: Mapping[Block, tuple[str, ...]] = MappingProxyType({})


class FormatTables(NamedTuple):
  """Rates and widths of K formats on a device."""

  rates: np.ndarray  # [K, K] operations a second, by weights' and activations' format
  bits: np.ndarray  # [K] bits in which a value is stored


# Where two pages of a vendor differ, the comment names both. Sources:
# [TPU vX] the page "TPU vX" of Google, docs.cloud.google.com/tpu/docs/vX.
# [TPU7x] "TPU7x (Ironwood)", docs.cloud.google.com/tpu/docs/tpu7x, whose table compares
#   v5p, v6e and TPU7x.
# [JAX] Google's TPU table in JAX 0.10, jax/_src/pallas/mosaic/tpu_info.py, rendered as
#   "TPU Hardware Reference", docs.jax.dev/en/latest/pallas/tpu/hardware.html; rounded.
#   Its rates of int4 are the only ones published. It lets v5e, v5p and v6e multiply
#   e5m2 and e4m3b11fnuz, which is e4m3 but for a power of two; v4 has no fp8 nor int4.
# [v5p] "Introducing Cloud TPU v5p and AI Hypercomputer", Google Cloud blog, December
#   2023, as quoted by newsflash.city/2401/a7c7c408caada5fa.html.
# [TensorRT-LLM] NVIDIA's GPU table in github.com/NVIDIA/TensorRT-LLM at 16d2467,
#   tensorrt_llm/auto_parallel/cluster_info.py, which names the data sheet of each:
#   A100, nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf; H100,
#   resources.nvidia.com/en-us-tensor-core/nvidia-tensor-core-gpu-datasheet; H200,
#   nvdam.widen.net/s/nb5zzzsjdf/hpc-datasheet-sc23-h200-datasheet-3002446.
# [Blackwell] NVIDIA's Blackwell data sheet, as copied by
#   zdszero.github.io/Computer/Artificial_Intelligence/Hardware.html.
# [DGX B200] nvidia.com/en-us/data-center/dgx-b200, as quoted by
#   brent-newsom-nvidia.github.io/AIPS-Boom/wiki/NVIDIA-DGX-B200; of eight GPUs.
# [TE] "Datatype and hardware support matrix", nvidia.github.io/TransformerEngine: MXFP8
#   and NVFP4 on Blackwell alone.
# [HGX B300] NVIDIA's HGX page, as quoted by glennklockwood.com/garden/processors/B300.
# [ISSCC] AMD at ISSCC 2026, as reported by 3dtested.com/tech-industry/semiconductors/
#   inside-the-instinct-mi355x: FP8 operations a clock and compute unit, 4096 of MI300X
#   and 8192 of MI355X, whose eight dies have 38 and 32 units.
# [Matrix Cores] AMD's guide to programming Matrix Cores, rocm.blogs.amd.com, as summed
#   up by ainews247.org/story/25700: FP8 is twice as fast as FP16 on CDNA3 and CDNA4; on
#   CDNA4 FP6 and FP4 are twice as fast as FP8, and E8M0 scales blocks.
# [MI300X] AMD's slides, as quoted by partofstyle.com/next-gen-chips-to-boast-320-cdna-
#   3-compute-units-192-gb-hbm3-memory-with-a-288-gb-hbm3e-boost-on-the-horizon: int8
#   is twice as fast as bf16. aiwiki.ai/wiki/amd_instinct_mi300x: 5.3 TB/s. AMD's
#   product page: 2100 MHz.
# [MI355X] svethardware.cz/amd-uvadi-akceleratory-instinct-mi350x-a-mi355x-s-288gb-
#   pameti-hbm3e/61870, after AMD's slides: 2400 MHz, int8 5 POPS, 8 TB/s.
# [TPU 8] "TPU 8t and TPU 8i", Google Cloud, 2026, as quoted by
#   sipoch.com/en/article/300330021435853 and tutorial.emka.web.id/?p=2150. Of TPU 8t
#   they give 12.6 PFLOPS in fp4 and 6528 GB/s, but nobody gives bf16: it is no row.
# [AMX] en.wikipedia.org/wiki/Advanced_Matrix_Extensions: 2048 int8 or 1024 bf16
#   operations a cycle and core.
# GPUs are the SXM variants; fp4 is NVFP4 and MXFP4. Hopper and Blackwell have no int4.
_MX = {Block(32, 'e8m0'): ('fp4', 'fp6', 'fp8')}
_MX_AND_NVFP4 = _MX | {Block(16, 'e4m3'): ('fp4',)}
DEVICES = {
  # [TPU v4] 275 teraflops (bf16 or int8), 1200 GBps; [v5p] 1228 GB/s; [JAX] 1.23e12.
  'tpu_v4': Device({'int8': 275e12, 'bf16': 275e12}, 1228e9),
  # [TPU v5e] 197 TFLOPs, 393 TOPs (Int8), 819 GBps (on some versions 800 GiBps, and no
  # int8); [JAX] 8.2e11, int8 394e12, int4 788e12.
  'tpu_v5e': Device({'int4': 788e12, 'int8': 393e12, 'bf16': 197e12}, 819e9),
  # [TPU v5p], [TPU7x] 459 TFLOPs in bf16 and in fp8, which saves bytes alone,
  # 2765 GBps; [v5p] 918 TOPS int8, 2765 GB/s; [JAX] int8 918e12, int4 1.84e15, and
  # 2.46e12 bytes a second, which no page of Google's has.
  'tpu_v5p': Device(
    {'int4': 1840e12, 'int8': 918e12, 'fp8': 459e12, 'bf16': 459e12}, 2765e9
  ),
  # [TPU v6e] 918 TFLOPs, 1836 TOPs (Int8), 1638 GBps (1640 and 1600 on other versions);
  # [TPU7x] fp8 918, as bf16; [JAX] int4 3.68e15, 1.64e12.
  'tpu_v6e': Device(
    {'int4': 3680e12, 'int8': 1836e12, 'fp8': 918e12, 'bf16': 918e12}, 1638e9
  ),
  # [TPU7x] 2307 TFLOPs in bf16, 4614 in fp8; [JAX] 2.31e15, 4.60e15, 7.40e12, no int8
  # nor int4.
  'tpu_7x': Device({'fp8': 4614e12, 'bf16': 2307e12}, 7400e9),
  # [TPU 8] fp4 10.1 PFLOPS, 8601 GB/s; [JAX] fp8 8.808e15, bf16 1.101e15, 8.60e12, no
  # int8 nor int4.
  'tpu_8i': Device({'fp4': 10100e12, 'fp8': 8808e12, 'bf16': 1101e12}, 8601e9),
  # [TensorRT-LLM] A100-SXM-80GB: int8 624, bfloat16 312, 2039 GB/s; int4 at twice the
  # rate of int8 (8192 operations a cycle and SM, 108 SMs at 1.41 GHz).
  'a100': Device({'int4': 1248e12, 'int8': 624e12, 'bf16': 312e12}, 2039e9),
  # [TensorRT-LLM] H100-SXM: int8 1979, fp8 1979, bfloat16 989, 3350 GB/s.
  'h100': Device({'int8': 1979e12, 'fp8': 1979e12, 'bf16': 989e12}, 3350e9),
  # [TensorRT-LLM] H200-SXM: int8 3958, fp8 3958, bfloat16 1979, which are the sparse
  # rates of the H100's data sheet, so the dense ones are the H100's; 4800 GB/s.
  'h200': Device({'int8': 1979e12, 'fp8': 1979e12, 'bf16': 989e12}, 4800e9),
  # [Blackwell] HGX B200, sparse: fp4 18, fp8 9, int8 9 and bf16 4.5 petaFLOPS, here
  # halved; 7.7 TB/s. [DGX B200] fp4 144 sparse, 72 dense, fp8 72 sparse; 64 TB/s.
  # [HGX B300] fp6 is as fast as fp8 on both. [TE] for the formats with blocks.
  'b200': Device(
    {
      'fp4': 9000e12,
      'fp6': 4500e12,
      'int8': 4500e12,
      'fp8': 4500e12,
      'bf16': 2250e12,
    },
    8000e9,
    _MX_AND_NVFP4,
  ),
  # [HGX B300] dense: fp4 13125, fp6 and fp8 4500, bf16 2250 TFLOPS, 8 TB/s. Of int8
  # sources give as much as fp8 has and a 36th of it, so it is left out.
  'b300': Device(
    {'fp4': 13125e12, 'fp6': 4500e12, 'fp8': 4500e12, 'bf16': 2250e12},
    8000e9,
    _MX_AND_NVFP4,
  ),
  # [ISSCC] 8·38 units of 4096 fp8 operations at [MI300X] 2100 MHz; [Matrix Cores] bf16
  # at half of it; [MI300X] int8 at twice that.
  'mi300x': Device({'int8': 2615e12, 'fp8': 2615e12, 'bf16': 1307e12}, 5300e9),
  # [ISSCC] 8·32 units of 8192 fp8 operations at [MI355X] 2400 MHz; [Matrix Cores] fp4
  # and fp6 at twice, bf16 at half of it; [MI355X] int8.
  'mi355x': Device(
    {
      'fp4': 10066e12,
      'fp6': 10066e12,
      'int8': 5033e12,
      'fp8': 5033e12,
      'bf16': 2517e12,
    },
    8000e9,
    _MX,
  ),
  # A CPU with AMX, Intel's Xeon Platinum 8480+: 56 cores at their base of 2.0 GHz,
  # eight channels of DDR5-4800 (Intel's product page); [AMX].
  'xeon_8480': Device({'int8': 229e12, 'bf16': 115e12}, 307e9),
}
DEFAULT = 'tpu_v5e'  # where a device is needed and none is named


_TPU_KINDS = {
  'TPU v4': 'tpu_v4',
  'TPU v5 lite': 'tpu_v5e',
  'TPU v5e': 'tpu_v5e',
  'TPU v5': 'tpu_v5p',
  'TPU v5p': 'tpu_v5p',
  'TPU v6 lite': 'tpu_v6e',
  'TPU v6e': 'tpu_v6e',
  'TPU7x': 'tpu_7x',
  'TPU8i': 'tpu_8i',
}


def get_device(name: str) -> Device:
  """Returns the device of that name.

  Raises:
    ConfigError: where there is none; the message names the nearest one.
  """
  if name not in DEVICES:
    raise ConfigError(not_among(f'unknown device {name!r}', name, DEVICES))
  return DEVICES[name]


def find_device(kind: str) -> Device | None:
  """Returns the device of a `jax.Device.device_kind`, None for an unknown one."""
  named = _TPU_KINDS.get(kind)
  gpu = re.search(r'\b(A100|H100|H200|B200|B300|MI300X|MI355X)\b', kind)
  return DEVICES.get(gpu.group().lower() if gpu else named)


@functools.lru_cache
def holding_types(format_name: str) -> tuple[str, ...]:
  """Returns the types that a format, or its blocks' values, can run in, best first.

  Each holds all of its values, up to a power of two: integers try int4, int8, then
  floats; floats try fp4 (e2m1), fp6 (e2m3 or e3m2), fp8 (e4m3 or e5m2), then bf16.
  Formats with more than the three mantissa bits of fp8 need bf16, and float32 counts as
  bf16.
  """
  format = find_format(format_name)
  if format.family == 'int':
    # An integer of up to 5 bits has at most 4 significant ones, as fp8 has.
    holds = {'int4': format.bits <= 4, 'int8': True, 'fp8': format.bits <= 5}
  else:
    exponent, mantissa = format.exponent_bits, format.mantissa_bits
    holds = {
      'fp4': exponent <= 2 and mantissa <= 1,
      'fp6': exponent <= 2 and mantissa <= 3 or exponent <= 3 and mantissa <= 2,
      'fp8': exponent <= 4 and mantissa <= 3 or exponent <= 5 and mantissa <= 2,
    }
  return (*(name for name, held in holds.items() if held), 'bf16')


def native_type(device: Device, *format_names: str) -> str:
  """Returns the type in which a device runs the product of values in these formats.

  The first one that the device has and that holds them all. With blocks it must be one
  whose blocks the device multiplies, else they are multiplied with their scales before
  the product, which is then one of bf16.
  """
  multiplied = set(device.peaks)
  for name in format_names:
    if block := find_format(name).block:
      multiplied &= {*device.blocks.get(block, ()), 'bf16'}
  if len({find_format(name).block for name in format_names} - {None}) > 1:
    multiplied = {'bf16'}
  first, *others = map(holding_types, format_names)
  return next(
    name
    for name in first
    if name in multiplied and all(name in types for types in others)
  )


def is_native(device: Device, *format_names: str) -> bool:
  """Returns whether a device multiplies these formats in as many bits as they have."""
  bits = max(min(find_format(name).bits, TYPE_BITS['bf16']) for name in format_names)
  return TYPE_BITS[native_type(device, *format_names)] == bits


def rate(device: Device, *format_names: str) -> float:
  """Returns the operations a second of the product of values in these formats."""
  return device.peaks[native_type(device, *format_names)]


# From few bits to many; blocks before their elements, which are less exact.
_CANDIDATES = (
    'int4', 'mxfp4', 'nvfp4', 'e2m1', 'mxfp6_e2m3', 'mxfp6_e3m2', 'e2m3', 'e3m2',
    'int8', 'mxfp8_e4m3', 'mxfp8_e5m2', 'e4m3', 'e5m2',
)  # fmt: skip


def fast_formats(name: str, required: bool = True) -> tuple[str, ...]:
  """Returns the formats that a device multiplies natively and faster than bf16, and it.

  Formats in blocks stand for those of their elements, which are as fast.

  Args:
    name: of the device.
    required: whether there must be one besides bf16.

  Raises:
    ConfigError: where there is no such device, or it has no such format.
  """
  device, found = get_device(name), {}  # format name -> element
  for candidate in _CANDIDATES:
    if (
      is_native(device, candidate)
      and rate(device, candidate) > device.peaks['bf16']
      and candidate not in found.values()
    ):
      found[candidate] = find_format(candidate).element
  if required and not found:
    raise ConfigError(
      f'{name} multiplies no format faster than bf16: expected formats by name, or '
      'another device'
    )
  return (*found, 'bf16')


def native_pairs(name: str, given: Sequence[str]) -> tuple[str, ...]:
  """Returns the pairs of weights' and activations' formats that a device multiplies.

  Those of which no activation has fewer bits than the weights: weights are unpacked
  from what is stored, and activations are written in what is multiplied.

  Args:
    name: of the device.
    given: options; formats stand for all of their native pairs.

  Raises:
    ConfigError: where there is no such device, or a pair that is given is none of
      them.
  """
  device, found = get_device(name), []
  for option in given:
    weights, activations = options.split(option)
    if ':' not in option:
      found += [
        options.join(option, other)
        for other in given
        if ':' not in other and _is_native_pair(device, option, other)
      ]
    elif _is_native_pair(device, weights, activations):
      found.append(option)
    else:
      raise ConfigError(
        f'{option} is no pair that {name} multiplies natively: it would run in '
        f'{native_type(device, weights, activations)}; expected weights of no more '
        'bits than activations, in formats that one type of the device holds, or '
        'search.weights_and_activations=tied, which takes any pair'
      )
  return tuple(dict.fromkeys(found))


def _is_native_pair(device, weights, activations):
  narrow, wide = (find_format(name).bits for name in (weights, activations))
  return narrow <= wide and is_native(device, weights, activations)


def emulated_pairs(
  name: str, formats: Mapping[str, Mapping[str, str]]
) -> dict[tuple[str, str], str]:
  """Returns how a device runs those pairs of formats that it only emulates.

  Args:
    name: of the device.
    formats: `{module path: {'weights': name, 'activations': name}}`.

  Returns:
    One line for each pair of weights' and activations' format.
  """
  device, lines = get_device(name), {}
  for operands in formats.values():
    pair = operands['weights'], operands['activations']
    if not is_native(device, *pair):
      lines[pair] = (
        f'{" × ".join(dict.fromkeys(pair))} is emulated on {name}: multiplied in '
        f'{native_type(device, *pair)}, at {rate(device, *pair) / 1e12:g} TFLOPS'
      )
  return lines


def format_tables(device: Device, names: tuple[str, ...]) -> FormatTables:
  """Returns the rates and widths of these formats and pairs of them, in float64."""
  return FormatTables(
    rates=np.array([[rate(device, w, a) for a in names] for w in names]),
    bits=np.array([_stored_bits(device, name) for name in names], float),
  )


def _stored_bits(device, name):
  format = find_format(name)
  if format.block is not None:  # unpacked where they are read
    return format.bits_per_value
  return TYPE_BITS[native_type(device, name)]
