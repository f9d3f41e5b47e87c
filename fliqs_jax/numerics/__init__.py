"""Numeric formats and the arithmetic in them: arrays in, arrays out, no Flax.

formats             names, families, code ranges; a format as a row that can be traced
rounding            one function that rounds to every format
blocks              values that share a scale, and these scales
units               parts of blocks: their largest magnitudes, and one number for each
calibration         statistics of a tensor, clipping thresholds, scales
reconstruction      rounding of weights that keeps what their layer computes
masking             parts of operands that a searched architecture leaves unused
products            what a layer computes with its formats, and its gradient
quantization_error  errors of rounding, and of switching between formats
"""

from fliqs_jax.numerics.blocks import BlockScales, Contraction
from fliqs_jax.numerics.calibration import (
  CALIBRATIONS,
  Quantizer,
  Statistics,
  calibrate,
  calibrate_blocks,
  clipping_threshold,
  tensor_statistics,
)
from fliqs_jax.numerics.formats import (
  BlockScaling,
  Format,
  NumericFormat,
  find_format,
  get_format,
  is_format,
  parse_names,
  stack,
)
from fliqs_jax.numerics.products import (
  LayerFormats,
  Product,
  fake_quantize,
  quantized_layer,
  quantized_operands,
  quantized_product,
)
from fliqs_jax.numerics.rounding import is_scaled, round_to_format

__all__ = [
  'BlockScales',
  'BlockScaling',
  'CALIBRATIONS',
  'Contraction',
  'Format',
  'LayerFormats',
  'NumericFormat',
  'Product',
  'Quantizer',
  'Statistics',
  'calibrate',
  'calibrate_blocks',
  'clipping_threshold',
  'fake_quantize',
  'find_format',
  'get_format',
  'is_format',
  'is_scaled',
  'parse_names',
  'quantized_layer',
  'quantized_operands',
  'quantized_product',
  'round_to_format',
  'stack',
  'tensor_statistics',
]
