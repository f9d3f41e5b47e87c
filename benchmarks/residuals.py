"""Bytes of a search step whose backward pass saves something else, compiled for a TPU.

    pip install -e '.[tpu]'
    python benchmarks/residuals.py [--network=resnet18] [--ways float codes ...]

Quantized products save their inputs and compute the codes again. The other ways are to
save 8-bit codes (`codes`; with `codes_kept` the forward pass multiplies these very
codes, behind a barrier), and to save the results of products alone (`products`; with
`products_kept` behind barriers, as `jax.checkpoint` has it by default). Formats have at
most 8 bits. The bytes count, not the gradients: of int8 codes none is left to tell the
largest value from one that is clipped, so that a mask of a bit would come on top.

Without `--network` it is the first three blocks of ResNet-18: some minutes a way.
"""

import argparse
import contextlib
import functools
from unittest import mock

import jax
from jax import lax
import jax.numpy as jnp
import tpu_aot

from fliqs_jax import models
from fliqs_jax.models import resnet
from fliqs_jax.numerics import convolutions, products

FIRST_BLOCKS = 'first_blocks'
FORMATS = ('int4', 'int8')


def saving_codes(barrier):
  """Returns `products.quantized_product` with 8-bit codes as its residuals."""

  def forward(product, scale_shape, x_kept, x, w, x_quantizer, w_quantizer):
    codes = barrier(x_quantizer.codes(x).astype(jnp.int8))
    accumulated = jnp.promote_types(x.dtype, jnp.float32)
    q_w = w_quantizer.multiplicands(w).astype(x.dtype)
    y = product(codes.astype(x.dtype), q_w, preferred_element_type=accumulated)
    y *= x_quantizer.scale * w_quantizer.scale.reshape(scale_shape)
    return y.astype(x.dtype), (codes, w, x_quantizer, w_quantizer)

  def backward(product, scale_shape, x_kept, residuals, y_bar):
    codes, w, x_quantizer, w_quantizer = residuals
    operands = (
      codes.astype(y_bar.dtype),
      w_quantizer.values(w).astype(y_bar.dtype),
    )
    x_bar, w_bar = (
      convolutions.transpose(product, operands, to, y_bar) for to in (0, 1)
    )
    inside = jnp.abs(operands[0]) < x_quantizer.format.max
    w_bar = jnp.where(w_quantizer.inside(w), w_bar * x_quantizer.scale, 0)
    return jnp.where(inside, x_bar, 0), w_bar.astype(w.dtype), None, None

  function = jax.custom_vjp(
    lambda *args: forward(*args)[0],
    nondiff_argnums=(0, 1, 2),
  )
  function.defvjp(forward, backward)
  return mock.patch.object(products, 'quantized_product', function)


def saving_products(kept):
  """Returns the step's loss whose residuals are the results of products alone."""
  gradients = jax.value_and_grad

  def value_and_grad(loss, **options):
    policy = jax.checkpoint_policies.dots_saveable
    loss = jax.checkpoint(loss, policy=policy, prevent_cse=kept)
    return gradients(loss, **options)

  return mock.patch.object(jax, 'value_and_grad', value_and_grad)


WAYS = {
  'codes': functools.partial(saving_codes, lambda codes: codes),
  'codes_kept': functools.partial(saving_codes, lax.optimization_barrier),
  'products': functools.partial(saving_products, False),
  'products_kept': functools.partial(saving_products, True),
}


def compiled(way, args):
  """Returns the step as it is changed by a way, compiled."""
  variant = 'float' if way == 'float' else 'search'
  return tpu_aot.compile_step(
      variant, args.network, args.topology, 224, args.batch_per_chip, 4, FORMATS
  )  # fmt: skip


def main():
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--network', default=FIRST_BLOCKS)
  parser.add_argument('--topology', default='v5e:2x2')
  parser.add_argument('--batch_per_chip', type=int, default=128)
  every = ('float', 'search', *WAYS)
  parser.add_argument('--ways', nargs='+', default=every, choices=every)
  args = parser.parse_args()
  models.MODELS[FIRST_BLOCKS] = functools.partial(
    resnet.ResNet, stage_sizes=(2, 1), block=resnet.BasicBlock
  )

  print(f'{"way":14} {"bytes":>10} {"from HBM":>10} {"temporaries":>12}')
  for way in args.ways:
    with WAYS[way]() if way in WAYS else contextlib.nullcontext():
      row = tpu_aot.figures(compiled(way, args))
    print(
      f'{way:14} {row["bytes"] / 1e9:7.2f} GB {row["hbm"] / 1e9:7.2f} GB '
      f'{row["temporaries"] / 1e6:9.0f} MB',
      flush=True,
    )


if __name__ == '__main__':
  main()
