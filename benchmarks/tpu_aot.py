"""Bytes and temporaries of a network's steps, compiled for TPUs without a TPU.

    pip install -e '.[tpu]'
    python benchmarks/tpu_aot.py [--network=resnet18] [--topology=v5e:2x4] [--json]

XLA compiles the float step, the step with fixed formats and the search step ahead of
time for the named topology. The figures are those of the compiled programs, per chip,
and deterministic. `bytes` is XLA's own figure, in which what is copied to the vector
memory ahead of its use counts more than once; `from HBM` is what moves to or from HBM
alone.
ResNet-18 takes one to two minutes a step on two cores, ResNet-50 ten.
"""

import argparse
import json
import os

# Compile for TPUs on a machine that has none; before jax is imported.
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
os.environ.setdefault('TPU_WORKER_HOSTNAMES', 'localhost')
os.environ.setdefault('TPU_ACCELERATOR_TYPE', 'v5litepod-8')

import compared_steps
from hbm_traffic import hbm_bytes
import jax
from jax.experimental import topologies
import jax.numpy as jnp

from fliqs_jax.training import sharding


def compile_step(
  variant, network, topology, image_size, batch_per_chip, num_samples, formats
):
  """Returns the compiled step of a variant, for all chips of the topology.

  Images are uint8, as in a run, and normalized by the step.
  """
  devices = topologies.get_topology_desc(platform='tpu', topology_name=topology).devices
  mesh = sharding.make_mesh(num_samples, devices)
  step, init = compared_steps.make_step(
    variant, mesh, image_size, jnp.bfloat16, formats, num_samples, network=network
  )
  state = jax.eval_shape(init, jax.random.key(0))
  batch = compared_steps.batch_shapes(
    batch_per_chip * len(devices), image_size, jnp.uint8, num_samples
  )
  return step.lower(state, batch).compile()


def figures(compiled):
  """Returns the bytes that a chip moves in a step and those of its temporaries."""
  return {
    'bytes': int(compiled.cost_analysis()['bytes accessed']),
    'hbm': hbm_bytes(compiled.as_text()),
    'temporaries': compiled.memory_analysis().temp_size_in_bytes,
  }


def main():
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--network', default='resnet18')
  parser.add_argument('--topology', default='v5e:2x4')
  parser.add_argument('--image_size', type=int, default=224)
  parser.add_argument('--batch_per_chip', type=int, default=128)
  parser.add_argument('--num_samples', type=int, default=8)
  parser.add_argument('--formats', default='int4,int8,bf16')
  parser.add_argument('--variants', default='float,search')
  parser.add_argument('--dump', help='folder for the compiled programs as text')
  parser.add_argument('--json', action='store_true', help='print one JSON object')
  args = parser.parse_args()

  result = {'network': args.network, 'topology': args.topology, 'steps': {}}
  for variant in args.variants.split(','):
    compiled = compile_step(
        variant, args.network, args.topology, args.image_size, args.batch_per_chip,
        args.num_samples, tuple(args.formats.split(',')),
    )  # fmt: skip
    result['steps'][variant] = figures(compiled)
    if args.dump:
      os.makedirs(args.dump, exist_ok=True)
      with open(os.path.join(args.dump, f'{variant}.hlo.txt'), 'w') as file:
        file.write(compiled.as_text())
  if args.json:
    print(json.dumps(result))
    return
  base = result['steps'].get('float')
  print(
    f'{"step":12} {"bytes":>10} {"from HBM":>10} {"temporaries":>12}   '
    f'per chip, {args.network}, {args.topology}'
  )
  for variant, row in result['steps'].items():
    ratios = base and ' '.join(f'{row[key] / base[key]:.3f}×' for key in row)
    print(
      f'{variant:12} {row["bytes"] / 1e9:7.2f} GB {row["hbm"] / 1e9:7.2f} GB '
      f'{row["temporaries"] / 1e6:9.0f} MB   {ratios or ""}',
      flush=True,
    )


if __name__ == '__main__':
  main()
