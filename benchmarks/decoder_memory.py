"""Memory of a chip in a decoder's search step, its parameters split over a TPU slice.

    pip install -e '.[tpu]'
    python benchmarks/decoder_memory.py [--network=llama_3_2_1b] [--depths=1,2] [--json]

Compiled by XLA ahead of time, without a TPU. Blocks are alike, so two depths give what
each one adds and, by a straight line through them, the figures of the whole network.
Each is of one chip and deterministic. `--fsdp=1` keeps all parameters on every chip.
"""

import argparse
import json
import os

# Compile for TPUs on a machine that has none; before jax is imported.
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
os.environ.setdefault('TPU_WORKER_HOSTNAMES', 'localhost')
os.environ.setdefault('TPU_ACCELERATOR_TYPE', 'v5litepod-8')

import jax
from jax.experimental import topologies
import jax.numpy as jnp

from fliqs_jax.models import decoder
from fliqs_jax.runs import evaluation, loop
from fliqs_jax.runs.config import default_config, resolve
from fliqs_jax.runs.setup import build
from fliqs_jax.training import sharding

NETWORKS = {
  'gemma_2b': decoder.GEMMA_2B,
  'gemma_7b': decoder.GEMMA_7B,
  'llama_3_2_1b': decoder.LLAMA_3_2_1B,
  'llama_2_7b': decoder.LLAMA_2_7B,
}


def make_config(network, depth, context, batch_size, num_samples, fsdp):
  """Returns the config of a search of a network with so many blocks."""
  config = default_config()
  sizes = {**NETWORKS[network], 'depth': depth, 'remat': True}
  config.num_classes = sizes.pop('vocabulary_size')
  config.model = {'name': 'decoder', 'width': 1.0, **sizes}
  config.dtype, config.input.context, config.fsdp = 'bfloat16', context, fsdp
  config.batch_size = config.eval_batch_size = batch_size
  config.optimizer.name, config.compilation_cache = 'adamw', ''
  config.search.update(
    formats='int_small', num_samples=num_samples, target_format='int4', target_scale=1.5
  )
  return resolve(config)


def figures(args, depth):
  """Returns the figures of a chip in the step of a network with so many blocks."""
  chips = topologies.get_topology_desc(
    platform='tpu', topology_name=args.topology
  ).devices
  batch_size = args.sequences_per_chip * len(chips) * args.num_samples
  config = make_config(
    args.network, depth, args.context, batch_size, args.num_samples, args.fsdp
  )
  setup = build(config, len(chips))
  mesh = sharding.make_mesh(args.num_samples, chips, args.fsdp)
  state = evaluation.abstract_state(setup, mesh)
  shape = args.num_samples, batch_size // args.num_samples, args.context + 1
  batch = {'tokens': jax.ShapeDtypeStruct(shape, jnp.int32)}
  compiled = loop.make_step(setup, mesh).lower(state, batch).compile()
  memory = compiled.memory_analysis()
  return {
    'parameters': sum(leaf.size for leaf in jax.tree.leaves(state.params)),
    'state': memory.argument_size_in_bytes,
    'temporaries': memory.temp_size_in_bytes,
    'bytes': int(compiled.cost_analysis()['bytes accessed']),
  }


def extrapolated(low, high, depths, depth):
  """Returns figures at another depth, on the line through those at two."""
  share = (depth - depths[0]) / (depths[1] - depths[0])
  return {name: low[name] + share * (high[name] - low[name]) for name in low}


def main():
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--network', choices=NETWORKS, default='llama_3_2_1b')
  parser.add_argument('--topology', default='v5e:8x8')
  parser.add_argument('--depths', default='1,2', help='the two that are compiled')
  parser.add_argument('--context', type=int, default=1024)
  parser.add_argument('--sequences_per_chip', type=int, default=1, help='of a sample')
  parser.add_argument('--num_samples', type=int, default=4)
  parser.add_argument('--fsdp', type=int, default=64)
  parser.add_argument('--json', action='store_true', help='print one JSON object')
  args = parser.parse_args()

  depths = tuple(map(int, args.depths.split(',')))
  rows = {depth: figures(args, depth) for depth in depths}
  whole = NETWORKS[args.network]['depth']
  rows[whole] = extrapolated(*rows.values(), depths, whole)
  if args.json:
    print(json.dumps({'network': args.network, 'topology': args.topology, **rows}))
    return
  print(f'{args.network}, fsdp={args.fsdp}, of a chip of {args.topology}')
  print('blocks  parameters  state GB  temporaries GB  bytes moved GB')
  for depth, row in rows.items():
    note = '' if depth in depths else '  extrapolated'
    print(
      f'{depth:6} {row["parameters"] / 1e9:9.3f} B {row["state"] / 1e9:9.2f} '
      f'{row["temporaries"] / 1e9:15.2f} {row["bytes"] / 1e9:15.2f}{note}'
    )


if __name__ == '__main__':
  main()
