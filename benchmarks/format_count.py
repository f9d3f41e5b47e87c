"""Step time and temporaries of the search step with 2, 4, 8 and 16 formats.

    python benchmarks/format_count.py [--json]

Formats are rows of a table, so both must be flat. The step is ResNet-18's; the variants
are timed in turns and the figures are medians.
"""

import argparse
import json
import statistics
import time

import compared_steps
import jax
import jax.numpy as jnp

from fliqs_jax.training import sharding

FORMATS = (
    'int4', 'int8', 'int3', 'int6', 'e2m1', 'e4m3', 'int2', 'bf16',
    'int5', 'int7', 'e2m3', 'e3m2', 'e3m4', 'e5m2', 'e2m2', 'e3m1',
)  # fmt: skip
COUNTS = (2, 4, 8, 16)


def prepare(count, mesh, args, batch):
  """Returns the compiled step with so many formats and its first state."""
  step, init = compared_steps.make_step(
    'search', mesh, args.image_size, formats=FORMATS[:count]
  )
  state = jax.jit(init)(jax.random.key(0))
  return step.lower(state, batch).compile(), state


def main():
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--image_size', type=int, default=224)
  parser.add_argument('--batch_size', type=int, default=8)
  parser.add_argument('--rounds', type=int, default=25)
  parser.add_argument('--json', action='store_true', help='print one JSON object')
  args = parser.parse_args()

  mesh = sharding.make_mesh(1)
  batch = compared_steps.random_batch(args.batch_size, args.image_size, jnp.float32)
  runs = {count: prepare(count, mesh, args, batch) for count in COUNTS}
  seconds = {count: [] for count in COUNTS}
  for round_number in range(args.rounds + 1):  # one to warm up
    for count, (step, state) in runs.items():
      began = time.perf_counter()
      state, _ = jax.block_until_ready(step(state, batch))
      if round_number:
        seconds[count].append(time.perf_counter() - began)
      runs[count] = step, state
  rows = {
    count: {
      'seconds': statistics.median(seconds[count]),
      'temporaries': step.memory_analysis().temp_size_in_bytes,
    }
    for count, (step, _) in runs.items()
  }
  if args.json:
    print(json.dumps({'platform': jax.default_backend(), 'formats': rows}))
    return
  first = rows[COUNTS[0]]
  for count, row in rows.items():
    print(
      f'{count:2} formats  {row["seconds"]:7.4f} s '
      f'{row["seconds"] / first["seconds"]:.3f}×  {row["temporaries"] / 1e6:8.2f} MB '
      f'{row["temporaries"] / first["temporaries"]:.4f}×'
    )


if __name__ == '__main__':
  main()
