"""ResNet's training steps, as the benchmarks compare them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fliqs_jax import models
from fliqs_jax.linen import discovery
from fliqs_jax.numerics.formats import find_format
from fliqs_jax.search import cost_models, rewards
from fliqs_jax.search.budget import Budget
from fliqs_jax.search.controller import entropy_weight, policy_gradient_controller
from fliqs_jax.search.space import build_space, uniform_space
from fliqs_jax.search.strategies.actor_critic import actor_critic
from fliqs_jax.search.strategies.problem import Problem
from fliqs_jax.training import steps, train_state
from fliqs_jax.training.classification import classification

VARIANTS = ('float', 'fixed_int8', 'search', 'search_blocks')
# The default strategy's step, and one of those, up to 128 in a run, that measure its
# samples too, of which it has two or more.
DEFAULT_STRATEGY = ('search_default', 'search_measuring')
BLOCK_FORMATS = ('nvfp4', 'mxfp8_e4m3', 'bf16')
NUM_CLASSES = 1000


def make_step(
  variant: str,
  mesh: jax.sharding.Mesh,
  image_size: int = 224,
  dtype=jnp.float32,
  formats: tuple[str, ...] = ('int4', 'int8', 'bf16'),
  num_samples: int = 1,
  wrap=None,
  network: str = 'resnet18',
):
  """Returns `(step, init)` of one variant.

  Args:
    variant: one of `VARIANTS` or `DEFAULT_STRATEGY`.
    mesh: from `sharding.make_mesh`.
    image_size: pixels a side.
    dtype: of the computation.
    formats: the options of the search; those of `search_blocks` are `BLOCK_FORMATS`.
    num_samples: samples a step, for the search.
    wrap: `model -> model`, applied to the network.
    network: its name.

  Returns:
    step: the jitted step `(state, batch) -> (state, metrics)`.
    init: `key -> state`.
  """
  model = models.create_model(
    network, NUM_CLASSES, quantized=variant != 'float', dtype=dtype
  )
  if wrap:
    model = wrap(model)
  inputs = jax.ShapeDtypeStruct((1, image_size, image_size, 3), dtype)
  task = classification(label_smoothing=0.1)
  layers = discovery.discover(model, inputs, train=False)
  controller = None
  if variant == 'search_blocks':
    formats = BLOCK_FORMATS
  if variant.startswith('search'):
    # The images have fewer channels than a block has values.
    pins = [('conv_init', 'bf16')] if any(map(_has_blocks, formats)) else []
    space = build_space(layers, formats, pins=pins)
    cost_model = cost_models.get_cost_model('bops')
    target = cost_model.uniform(layers, formats[0])
    if variant in DEFAULT_STRATEGY:
      controller = _default_controller(
        space, Budget(cost_model, target), num_samples, variant == 'search_measuring'
      )
    else:
      controller = _policy_gradient(space, target, num_samples)
    step = steps.make_search_step(
      task, space, cost_model, controller, mesh, num_samples=num_samples
    )
  else:
    space = uniform_space(layers, 'int8')
    step = steps.make_train_step(task, space, mesh)
  optimizer = optax.chain(optax.add_decayed_weights(1e-4), optax.sgd(0.1, momentum=0.9))

  def init(key):
    image = jnp.zeros(inputs.shape, dtype)
    example = train_state.Arguments((image,), {'train': False})
    return train_state.create_train_state(model, example, optimizer, controller, key)

  return step, init


def _default_controller(space, target, num_samples, measures):
  """Returns the default strategy's controller, which measures always or never."""
  problem = Problem(
    space=space,
    target=target,
    caps=(),
    num_samples=num_samples,
    policy_delay=0,
    commit_step=1000,
    seed=0,
    entropy_schedule='cosine',
  )
  # By the step, so that the compiler does not know.
  is_measured = (lambda step: step >= 0) if measures else (lambda step: step < 0)
  return actor_critic(problem)._replace(is_measured=is_measured)


def _policy_gradient(space, target, num_samples):
  """Returns the controller of FLIQS's own strategy."""
  return policy_gradient_controller(
    space.valid,
    functools.partial(rewards.absolute, target=target, beta=1.0),
    entropy_weight('cosine', 0.1, 0, 1000),
    baseline='leave_one_out' if num_samples > 1 else 'moving',
  )


def _has_blocks(name):
  return find_format(name).block is not None


def batch_shapes(batch_size: int, image_size: int, dtype, num_samples: int = 1):
  """Returns the shapes and dtypes of a batch `[S, B / S, ...]`."""
  leading = num_samples, batch_size // num_samples
  return {
    'image': jax.ShapeDtypeStruct((*leading, image_size, image_size, 3), dtype),
    'label': jax.ShapeDtypeStruct(leading, jnp.int32),
  }


def random_batch(batch_size: int, image_size: int, dtype, num_samples: int = 1):
  """Returns a batch `[S, batch_size / S, ...]` of noise."""
  rng = np.random.default_rng(0)
  shapes = batch_shapes(batch_size, image_size, dtype, num_samples)
  return {
    'image': jnp.asarray(rng.normal(size=shapes['image'].shape), dtype),
    'label': jnp.asarray(rng.integers(NUM_CLASSES, size=shapes['label'].shape)),
  }
