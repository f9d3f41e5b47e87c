"""Training steps of a network, as the benchmarks compare them.

Networks are those of images in `fliqs_jax.models`, by name, and `decoder_block`: one
block of a decoder of width 2048, with the sizes of Llama 3.2 1B but few tokens.
"""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fliqs_jax import models
from fliqs_jax.layers.layer import Layer
from fliqs_jax.linen import discovery
from fliqs_jax.models import decoder
from fliqs_jax.numerics.formats import find_format
from fliqs_jax.search import cost_models, rewards
from fliqs_jax.search.budget import Budget
from fliqs_jax.search.controller import entropy_weight, policy_gradient_controller
from fliqs_jax.search.space import build_space, uniform_space
from fliqs_jax.search.strategies.actor_critic import actor_critic
from fliqs_jax.search.strategies.problem import Problem
from fliqs_jax.training import preprocessing, steps, train_state
from fliqs_jax.training.classification import classification
from fliqs_jax.training.language_modelling import language_modelling
from fliqs_jax.training.task import Task, image_arguments

VARIANTS = ('float', 'fixed_int8', 'search', 'search_blocks')
# The default strategy's step, and one of those, up to 128 in a run, that measure its
# samples too, of which it has two or more.
DEFAULT_STRATEGY = ('search_default', 'search_measuring')
BLOCK_FORMATS = ('nvfp4', 'mxfp8_e4m3', 'bf16')
DECODER_BLOCK = 'decoder_block'
NUM_CLASSES, NUM_TOKENS = 1000, 256
MEAN, STDDEV = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Workload(NamedTuple):
  """A network, what it is called with, and what it is trained for."""

  model: Any
  example: train_state.Arguments  # of one image or text
  task: Task
  layers: tuple[Layer, ...]  # none of a float network of NNX, which is left as it is


def make_workload(
  network: str, quantized: bool, size: int, dtype: Any, wrap: Callable | None = None
) -> Workload:
  """Returns the workload of a network; the arguments are those of `make_step`."""
  wrap = wrap or (lambda model: model)
  if network == DECODER_BLOCK:
    sizes = {**decoder.LLAMA_3_2_1B, 'depth': 1}
    del sizes['vocabulary_size']
    model = wrap(models.create_model('decoder', NUM_TOKENS, dtype=dtype, **sizes))
    tokens = jax.ShapeDtypeStruct((1, size), jnp.int32)
    layers = model.coverage(tokens, train=False).layers if quantized else ()
    example, task = tokens, language_modelling()
  else:
    model = models.create_model(network, NUM_CLASSES, quantized=quantized, dtype=dtype)
    model = wrap(model)
    example = jax.ShapeDtypeStruct((1, size, size, 3), dtype)
    layers = discovery.discover(model, example, train=False)
    task = classification(label_smoothing=0.1)._replace(arguments=_image_arguments)
  return Workload(
    model, train_state.Arguments((example,), {'train': False}), task, layers
  )


def _image_arguments(batch, train):
  """Returns the network's arguments; uint8 images are normalized, as in a run."""
  image = batch['image']
  if image.dtype == jnp.uint8:
    image = preprocessing.normalize(image, MEAN, STDDEV)
  return image_arguments({'image': image}, train)


def make_step(
  variant: str,
  mesh: jax.sharding.Mesh,
  size: int = 224,
  dtype=jnp.float32,
  formats: tuple[str, ...] = ('int4', 'int8', 'bf16'),
  num_samples: int = 1,
  wrap: Callable | None = None,
  network: str = 'resnet18',
):
  """Returns `(step, init)` of one variant.

  Args:
    variant: one of `VARIANTS` or `DEFAULT_STRATEGY`.
    mesh: from `sharding.make_mesh`.
    size: pixels a side of an image, or tokens of a text.
    dtype: of the computation.
    formats: the options of the search; those of `search_blocks` are `BLOCK_FORMATS`.
    num_samples: samples a step, for the search.
    wrap: `model -> model`, applied to the network.
    network: its name, or `DECODER_BLOCK`.

  Returns:
    step: the jitted step `(state, batch) -> (state, metrics)`.
    init: `key -> state`.
  """
  work = make_workload(network, variant != 'float', size, dtype, wrap)
  controller = None
  if variant.startswith('search'):
    formats = BLOCK_FORMATS if variant == 'search_blocks' else formats
    step, controller = _search(variant, work, mesh, formats, num_samples)
  else:
    step = steps.make_train_step(work.task, uniform_space(work.layers, 'int8'), mesh)
  optimizer = optax.chain(optax.add_decayed_weights(1e-4), optax.sgd(0.1, momentum=0.9))

  def init(key):
    return train_state.create_train_state(
      work.model, work.example, optimizer, controller, key
    )

  return step, init


def _search(variant, work, mesh, formats, num_samples):
  """Returns the search step and its controller."""
  # The images have fewer channels than a block has values.
  is_image = work.layers[0].kind == 'conv'
  pins = [('conv_init', 'bf16')] if is_image and any(map(_has_blocks, formats)) else []
  space = build_space(work.layers, formats, pins=pins)
  cost_model = cost_models.get_cost_model('bops')
  target = cost_model.uniform(work.layers, formats[0])
  if variant in DEFAULT_STRATEGY:
    controller = _default_controller(
      space, Budget(cost_model, target), num_samples, variant == 'search_measuring'
    )
  else:
    controller = _policy_gradient(space, target, num_samples)
  step = steps.make_search_step(
    work.task, space, cost_model, controller, mesh, num_samples=num_samples
  )
  return step, controller


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


def batch_shapes(
  batch_size: int, size: int, dtype, num_samples: int = 1, network: str = 'resnet18'
):
  """Returns the shapes and dtypes of a batch `[S, B / S, ...]`, images in `dtype`."""
  leading = num_samples, batch_size // num_samples
  if network == DECODER_BLOCK:
    return {'tokens': jax.ShapeDtypeStruct((*leading, size + 1), jnp.int32)}
  return {
    'image': jax.ShapeDtypeStruct((*leading, size, size, 3), dtype),
    'label': jax.ShapeDtypeStruct(leading, jnp.int32),
  }


def random_batch(
  batch_size: int, size: int, dtype, num_samples: int = 1, network: str = 'resnet18'
):
  """Returns a batch `[S, batch_size / S, ...]` of noise."""
  rng = np.random.default_rng(0)
  largest = {'label': NUM_CLASSES, 'tokens': NUM_TOKENS}
  shapes = batch_shapes(batch_size, size, dtype, num_samples, network)
  return {
    name: jnp.asarray(
      rng.integers(largest[name], size=shape.shape)
      if name in largest
      else rng.normal(size=shape.shape),
      shape.dtype,
    )
    for name, shape in shapes.items()
  }
