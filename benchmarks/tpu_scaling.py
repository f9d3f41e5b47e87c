"""Bytes, temporaries and traffic of ResNet-50's search step on TPUs of growing size.

    pip install -e '.[tpu]'
    python benchmarks/tpu_scaling.py [--results=FILE] [--json]

Compiled by XLA ahead of time, without a TPU, at a fixed batch a chip. All figures are
those of one chip and deterministic. Traffic is what a chip sends where every collective
is a ring: of n bytes in a group of g chips, n·(g − 1)/g for a reduce-scatter or an
all-gather and twice that for an all-reduce (Patarasuk and Yuan, 2009). Beside it stands
what one all-reduce of the float32 gradients over all chips sends, as plain data
parallelism does. Hours are those of a whole training at half of the
chip's roofline (`--efficiency`), data and compilation excluded.

A compilation takes ten minutes or more on two cores; `--results` keeps the figures, and
topologies that are in it already are not compiled again.
"""

import argparse
import functools
import json
import math
import os
import pathlib
import re

# Compile for TPUs on a machine that has none; before jax is imported.
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
os.environ.setdefault('TPU_WORKER_HOSTNAMES', 'localhost')
os.environ.setdefault('TPU_ACCELERATOR_TYPE', 'v5litepod-8')

import compared_steps
import jax
from jax.experimental import topologies
import jax.numpy as jnp

from fliqs_jax.layers.layer import Layer
from fliqs_jax.search import cost_models, devices, rewards
from fliqs_jax.search.controller import (
  Outcome,
  entropy_weight,
  policy_gradient_controller,
)
from fliqs_jax.search.space import build_space
from fliqs_jax.training import sharding

FORMATS = (
    'int2', 'int3', 'int4', 'int5', 'int6', 'int7', 'int8', 'bf16',
    'e2m1', 'e2m3', 'e3m2', 'e3m4', 'e4m3', 'e5m2', 'e2m2', 'e3m1',
)  # fmt: skip
NUM_SAMPLES = 8
EXAMPLES = 90 * 1_281_167  # 90 epochs of ImageNet, the recipe's

_COLLECTIVE = re.compile(
  r'^\s*(?:ROOT )?%\S+ = (?P<shape>.+?) '
  r'(?P<kind>all-reduce|all-gather|reduce-scatter)(?P<start>-start)?\('
)
# A reduce-scatter on TPUs is a computation of this name around an all-reduce.
_REDUCE_SCATTER = re.compile(r'^%all-reduce-scatter\S* \(')
_ARRAY = re.compile(r'\b([a-z]+\d+|pred)\[([\d,]*)\]')
# Three notations: lists of chips, a matrix with a row a group, axes of a mesh.
_LISTS = re.compile(r'replica_groups=\{\{([\d,]+)\}')
_MATRIX = re.compile(r'replica_groups=\[\d+,(\d+)\]<=')
_MESH = re.compile(r'replica_groups=mesh\[([^\]]*)\].*? \{([^}]*)\}')


def num_bytes(shape):
  """Returns the bytes of an array or a tuple of arrays in HLO's notation."""
  return sum(
    math.prod(map(int, filter(None, dims.split(','))))
    * max(int(re.sub(r'\D', '', dtype) or 8) // 8, 1)
    for dtype, dims in _ARRAY.findall(shape)
  )


def group_size(line):
  """Returns the number of chips among which a collective of HLO is."""
  if found := _LISTS.search(line):
    return len(found[1].split(','))
  if found := _MATRIX.search(line):
    return int(found[1])
  if found := _MESH.search(line):
    sizes = dict(axis.split('=') for axis in found[1].split(','))
    return math.prod(int(sizes[axis]) for axis in found[2].split(','))
  raise ValueError(f'no replica groups in {line.strip()[:300]!r}')


def ring_all_reduce(size, chips):
  """Returns the bytes that a chip sends in an all-reduce of `size` bytes."""
  return 2 * size * (chips - 1) / chips


def traffic(program):
  """Returns the bytes that a chip sends, by kind of collective.

  Args:
    program: a compiled HLO module as text.
  """
  total = dict.fromkeys(('all-reduce', 'reduce-scatter', 'all-gather'), 0.0)
  scattering = False
  for line in program.splitlines():
    if line.startswith('%') or line.startswith('ENTRY'):
      scattering = bool(_REDUCE_SCATTER.match(line))
    found = _COLLECTIVE.match(line)
    if not found:
      continue
    kind, chips, size = found['kind'], group_size(line), num_bytes(found['shape'])
    if kind == 'all-gather' and found['start']:
      size = size * chips / (chips + 1)  # its shape is that of operand and result
    if kind == 'reduce-scatter':
      size *= chips  # its shape is that of the result
    sent = ring_all_reduce(size, chips)
    if scattering:
      kind = 'reduce-scatter'
    total[kind] += sent if kind == 'all-reduce' else sent / 2
  return total


def compile_step(network, image_size, topology, batch_per_chip):
  """Returns the compiled search step, the bytes of its gradients and the chip."""
  chips = topologies.get_topology_desc(platform='tpu', topology_name=topology).devices
  mesh = sharding.make_mesh(NUM_SAMPLES, chips)
  step, init = compared_steps.make_step(
    'search', mesh, image_size, jnp.bfloat16, num_samples=NUM_SAMPLES, network=network
  )
  state = jax.eval_shape(init, jax.random.key(0))
  batch = compared_steps.batch_shapes(
    batch_per_chip * len(chips), image_size, jnp.bfloat16, NUM_SAMPLES
  )
  gradients = sum(
    leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.params)
  )
  return step.lower(state, batch).compile(), gradients, chips


def figures(network, image_size, topology, batch_per_chip):
  """Returns the figures of one topology, of one chip."""
  compiled, gradients, chips = compile_step(
    network, image_size, topology, batch_per_chip
  )
  cost = compiled.cost_analysis()
  return {
    'chips': len(chips),
    'device_kind': chips[0].device_kind,
    'batch_per_chip': batch_per_chip,
    'bytes': cost['bytes accessed'],
    'flops': cost['flops'],
    'temporaries': compiled.memory_analysis().temp_size_in_bytes,
    'gradients': gradients,
    'traffic': traffic(compiled.as_text()),
  }


def controller_figures(topology, num_decisions, num_samples):
  """Returns flops and bytes of sampling, costs, rewards and the policy's update.

  What a search step does beside the network, for so many decisions among the 16
  formats, compiled alone for one chip: every chip does the whole of it.
  """
  chip = topologies.get_topology_desc(platform='tpu', topology_name=topology).devices[0]
  mesh = sharding.make_mesh(1, [chip])
  layers = tuple(
    Layer(f'layer{i}', 'op', 'dense', (1, 64), (64, 64), (1, 64), 64 * 64, 64 * 64)
    for i in range(num_decisions)
  )
  space = build_space(layers, FORMATS)
  assert space.valid.shape == (num_decisions, len(FORMATS)) and space.valid.all()
  cost_model = cost_models.get_cost_model('bops')
  target = cost_model.uniform(layers, 'int4')
  controller = policy_gradient_controller(
    space.valid,
    functools.partial(rewards.absolute, target=target, beta=1.0),
    entropy_weight('cosine', 0.1, 0, 1000),
  )

  def control(state, keys, quality, step):
    choices = controller.sample(state, keys)
    costs = cost_model(space, choices)
    outcome = Outcome(choices, quality, costs)
    return controller.update(state, outcome, step), costs

  shapes = (
    jax.eval_shape(controller.init),
    jax.eval_shape(lambda: jax.random.split(jax.random.key(0), num_samples)),
    jax.ShapeDtypeStruct((num_samples,), jnp.float32),
    jax.ShapeDtypeStruct((), jnp.int32),
  )
  replicated = sharding.replicated(mesh)
  cost = (
    jax.jit(control, in_shardings=replicated, out_shardings=replicated)
    .lower(*shapes)
    .compile()
    .cost_analysis()
  )
  return {
    'flops': cost['flops'] + cost.get('transcendentals', 0.0),
    'bytes': cost['bytes accessed'],
  }


def roofline(row, efficiency):
  """Returns seconds a step and chip-hours a training at that part of the roofline."""
  device = devices.find_device(row['device_kind'])
  seconds = max(row['bytes'] / device.bandwidth, row['flops'] / device.peaks['bf16'])
  seconds /= efficiency
  num_steps = EXAMPLES / (row['batch_per_chip'] * row['chips'])
  return seconds, seconds * num_steps * row['chips'] / 3600


def print_table(results, efficiency):
  print('topology   chips  images/chip  bytes GB  temp. MB  sent MB  of gradients MB'
        '  ratio   ms/step  hours  chip-hours')  # fmt: skip
  for row in results['steps']:
    seconds, chip_hours = roofline(row, efficiency)
    sent = sum(row['traffic'].values())
    needed = ring_all_reduce(row['gradients'], row['chips'])
    print(
      f'{row["topology"]:10} {row["chips"]:5} {row["batch_per_chip"]:12} '
      f'{row["bytes"] / 1e9:9.2f} {row["temporaries"] / 1e6:9.0f} '
      f'{sent / 1e6:8.2f} {needed / 1e6:16.2f} {sent / needed:6.3f} '
      f'{seconds * 1e3:9.1f} '
      f'{chip_hours / row["chips"]:6.2f} {chip_hours:11.1f}'
    )
  control, step = results['controller'], results['steps'][0]
  print(
    f'controller, {control["decisions"]} decisions among {len(FORMATS)} formats: '
    f'{control["flops"] / step["flops"]:.5%} of the operations of the first step, '
    f'{control["bytes"] / step["bytes"]:.3%} of its bytes'
  )


def main():
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--network', default='resnet50')
  parser.add_argument('--image_size', type=int, default=224)
  parser.add_argument(
    '--topologies',
    default='v5e:2x4/128,v5e:8x8/128,v5e:16x16/128,v5p:4x4x4/128',
    help='comma-separated, each with its images a chip',
  )
  parser.add_argument('--decisions', type=int, default=1000, help="the controller's")
  parser.add_argument('--efficiency', type=float, default=0.5, help='of the roofline')
  parser.add_argument('--results', type=pathlib.Path, help='file that keeps figures')
  parser.add_argument('--json', action='store_true', help='print one JSON object')
  args = parser.parse_args()

  kept = {}
  if args.results and args.results.exists():
    kept = json.loads(args.results.read_text())

  def measured(name, function, *arguments):
    if name not in kept:
      kept[name] = function(*arguments)
      if args.results:
        args.results.write_text(json.dumps(kept, indent=2))
    return kept[name]

  results = {'network': args.network, 'image_size': args.image_size, 'steps': []}
  for name in args.topologies.split(','):
    topology, _, batch = name.partition('/')
    row = measured(
        f'{args.network} {args.image_size} {name}', figures,
        args.network, args.image_size, topology, int(batch),
    )  # fmt: skip
    results['steps'].append({'topology': topology, **row})
  results['controller'] = {
    'decisions': args.decisions,
    **measured(
        f'controller {args.decisions}', controller_figures,
        results['steps'][0]['topology'], args.decisions, NUM_SAMPLES,
    ),
  }  # fmt: skip
  print(json.dumps(results)) if args.json else print_table(results, args.efficiency)


if __name__ == '__main__':
  main()
