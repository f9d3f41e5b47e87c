"""Seconds of a search step: architecture and formats, beside formats alone.

    python benchmarks/joint_step_time.py [--json]

Both on one supernet, the second with the largest network that it holds. Compiled first
and then timed in turns; the numbers are medians.
"""

import argparse
import functools
import json
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fliqs_jax import models
from fliqs_jax.layers import architecture
from fliqs_jax.linen import discovery
from fliqs_jax.search import controller, cost_models, rewards
from fliqs_jax.search.space import build_space
from fliqs_jax.training import sharding, steps
from fliqs_jax.training.classification import classification
from fliqs_jax.training.train_state import Arguments, create_train_state


def largest(name, options, default):
  """Chooses the network whose size the supernet has."""
  del name
  return max([*options, default])


def prepare(choose, args):
  """Returns the jitted search step and its first state."""
  model = models.create_model(args.model, 1000, choose=choose, width=args.width)
  inputs = jax.ShapeDtypeStruct((1, args.image_size, args.image_size, 3), jnp.float32)
  layers = discovery.discover(model, inputs, train=False)
  space = build_space(layers, ('int4', 'int8', 'bf16'))
  policy = controller.policy_gradient_controller(
    space.valid,
    functools.partial(rewards.absolute, target=1.0, beta=1.0),
    lambda step: 0.1,
  )
  mesh = sharding.make_mesh(1, jax.devices()[:1])
  step = steps.make_search_step(
    classification(),
    space,
    cost_models.get_cost_model('bops'),
    policy,
    mesh,
    num_samples=args.samples,
  )
  example = Arguments((jnp.zeros(inputs.shape),), {'train': False})
  state = create_train_state(
    model, example, optax.sgd(0.1, 0.9), policy, jax.random.key(0)
  )
  return step, state


def main():
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--model', default='mobilenet_v2', help='or a ResNet')
  parser.add_argument('--image_size', type=int, default=96)
  parser.add_argument('--batch_size', type=int, default=16, help='of all samples')
  parser.add_argument('--samples', type=int, default=2)
  parser.add_argument('--width', type=float, default=0.25)
  parser.add_argument('--rounds', type=int, default=15)
  parser.add_argument('--json', action='store_true', help='print one JSON object')
  args = parser.parse_args()

  rng = np.random.default_rng(0)
  shape = (args.samples, args.batch_size // args.samples)
  images = rng.normal(size=(*shape, args.image_size, args.image_size, 3))
  batch = {
    'image': jnp.asarray(images, jnp.float32),
    'label': jnp.asarray(rng.integers(1000, size=shape)),
  }
  runs = {
    'formats': prepare(largest, args),
    'formats and architecture': prepare(architecture.searched, args),
  }
  seconds = {name: [] for name in runs}
  for round_number in range(args.rounds + 2):  # two to compile and to warm up
    for name, (step, state) in runs.items():
      began = time.perf_counter()
      state = jax.block_until_ready(step(state, batch)[0])
      if round_number >= 2:
        seconds[name].append(time.perf_counter() - began)
      runs[name] = step, state
  medians = {name: statistics.median(times) for name, times in seconds.items()}
  if args.json:
    print(json.dumps({'platform': jax.default_backend(), 'seconds': medians}))
    return
  for name, median in medians.items():
    print(f'{name:26} {median:8.4f} s   {median / medians["formats"]:.3f}×')


if __name__ == '__main__':
  main()
