"""Seconds of a network's steps: float, fixed int8, searches, and Qwix's int8 and fp8.

    pip install -e '.[benchmark]'
    python benchmarks/step_time.py [--network=resnet18] [--variants float ...] [--json]

and on a GPU

    python benchmarks/step_time.py --network=resnet50 --dtype=bfloat16 --batch_size=256
    python benchmarks/step_time.py --network=decoder_block --dtype=bfloat16 --size=1024

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

import compared_steps
import jax
import jax.numpy as jnp
import qwix

from fliqs_jax.training import sharding

SAMPLES = 2  # of the variants of the default strategy
QWIX_TYPES = {'qwix_int8': 'int8', 'qwix_fp8': 'float8_e4m3fn'}
VARIANTS = (*compared_steps.VARIANTS, *QWIX_TYPES)


def prepare(variant, mesh, args):
  """Returns `state -> state`, one step of a variant, and its first state."""
  qtype = QWIX_TYPES.get(variant)
  num_samples = SAMPLES if variant in compared_steps.DEFAULT_STRATEGY else 1
  step, init = compared_steps.make_step(
    'float' if qtype else variant,
    mesh,
    args.size,
    jnp.dtype(args.dtype),
    num_samples=num_samples,
    wrap=(lambda model: quantize_by_qwix(model, qtype)) if qtype else None,
    network=args.network,
  )
  batch = compared_steps.random_batch(
    args.batch_size, args.size, args.dtype, num_samples, args.network
  )
  state = jax.jit(init)(jax.random.key(0))
  return lambda state: step(state, batch)[0], state


def quantize_by_qwix(model, qtype):
  """Returns the model with all layers in one format, as Qwix trains it."""
  rule = qwix.QtRule(module_path='.*', weight_qtype=qtype, act_qtype=qtype)
  return qwix.quantize_model(model, qwix.QtProvider([rule]))


def main():
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--network', default='resnet18')
  parser.add_argument('--size', type=int, default=224, help='pixels a side, or tokens')
  parser.add_argument('--batch_size', type=int, default=8)
  parser.add_argument('--dtype', default='float32')
  parser.add_argument('--rounds', type=int, default=15)
  parser.add_argument(
    '--variants',
    nargs='+',
    choices=(*VARIANTS, *compared_steps.DEFAULT_STRATEGY),
    help='without it all but those of the default strategy',
  )
  parser.add_argument('--json', action='store_true', help='print one JSON object')
  args = parser.parse_args()
  # Qwix's training takes networks of linen here.
  is_linen = args.network != compared_steps.DECODER_BLOCK
  args.variants = args.variants or (VARIANTS if is_linen else compared_steps.VARIANTS)

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
  if args.json:
    print(json.dumps({
        'platform': jax.default_backend(), **vars(args), 'seconds': medians
    }))  # fmt: skip
    return
  print(
    f'{args.network}, {args.batch_size} of size {args.size}, {args.dtype}, '
    f'{jax.devices()[0].device_kind}, medians of {args.rounds} steps taken in turns'
  )
  for variant, median in medians.items():
    print(f'{variant:16} {median:8.4f} s   {median / medians[args.variants[0]]:.3f}×')


if __name__ == '__main__':
  main()
