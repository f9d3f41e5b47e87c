"""Seconds of ResNet-18's steps: float, fixed int8, searches, and Qwix's int8 and fp8.

    pip install -e '.[benchmark]'
    python benchmarks/step_time.py [--variants float search ...] [--json]

All variants are compiled first and then timed in turns within one run, so that what
else the machine does falls on all of them alike; the figures are medians, and ratios to
the first variant. `search` is the step of `policy_gradient`, `search_default` that of
the default strategy, and `search_measuring` one of its up to 128 steps that measure;
these two take the batch in two samples, one after the other.
"""

import argparse
import json
import statistics
import time

import jax
import jax.numpy as jnp
import qwix
import resnet_steps

from fliqs_jax.training import sharding

SAMPLES = 2  # of the variants of the default strategy
QWIX_TYPES = {'qwix_int8': 'int8', 'qwix_fp8': 'float8_e4m3fn'}
VARIANTS = (*resnet_steps.VARIANTS, *QWIX_TYPES)


def prepare(variant, mesh, args):
  """Returns `state -> state`, one step of a variant, and its first state."""
  qtype = QWIX_TYPES.get(variant)
  num_samples = SAMPLES if variant in resnet_steps.DEFAULT_STRATEGY else 1
  step, init = resnet_steps.make_step(
    'float' if qtype else variant,
    mesh,
    args.image_size,
    jnp.dtype(args.dtype),
    num_samples=num_samples,
    wrap=(lambda model: quantize_by_qwix(model, qtype)) if qtype else None,
  )
  batch = resnet_steps.random_batch(
    args.batch_size, args.image_size, args.dtype, num_samples
  )
  state = jax.jit(init)(jax.random.key(0))
  return lambda state: step(state, batch)[0], state


def quantize_by_qwix(model, qtype):
  """Returns the model with all layers in one format, as Qwix trains it."""
  rule = qwix.QtRule(module_path='.*', weight_qtype=qtype, act_qtype=qtype)
  return qwix.quantize_model(model, qwix.QtProvider([rule]))


def main():
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--image_size', type=int, default=224)
  parser.add_argument('--batch_size', type=int, default=8)
  parser.add_argument('--dtype', default='float32')
  parser.add_argument('--rounds', type=int, default=15)
  parser.add_argument(
    '--variants',
    nargs='+',
    default=VARIANTS,
    choices=(*VARIANTS, *resnet_steps.DEFAULT_STRATEGY),
  )
  parser.add_argument('--json', action='store_true', help='print one JSON object')
  args = parser.parse_args()

  mesh = sharding.make_mesh(1)
  runs = {variant: prepare(variant, mesh, args) for variant in args.variants}
  seconds = {variant: [] for variant in args.variants}
  for round_number in range(args.rounds + 2):  # two to compile and to warm up
    for variant, (step, state) in runs.items():
      began = time.perf_counter()
      state = jax.block_until_ready(step(state))
      if round_number >= 2:
        seconds[variant].append(time.perf_counter() - began)
      runs[variant] = step, state
  medians = {variant: statistics.median(times) for variant, times in seconds.items()}
  shape = [args.batch_size, args.image_size, args.image_size, 3]
  if args.json:
    print(json.dumps({
        'platform': jax.default_backend(), 'shape': shape, 'seconds': medians
    }))  # fmt: skip
    return
  print(f'ResNet-18, {shape}, {args.dtype}, {jax.default_backend()}, medians of '
        f'{args.rounds} steps taken in turns')  # fmt: skip
  for variant, median in medians.items():
    print(f'{variant:16} {median:8.4f} s   {median / medians[args.variants[0]]:.3f}×')


if __name__ == '__main__':
  main()
