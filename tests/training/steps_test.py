"""The steps against the same arithmetic written out, and on several sharding."""

import functools
import subprocess
import sys
from typing import NamedTuple

import chex
from conftest import ROOT
from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fliqs_jax.layers.variables import FORMATS, nest
from fliqs_jax.linen import discovery
from fliqs_jax.linen import operators as layers
from fliqs_jax.search import controller, cost_models, rewards
from fliqs_jax.search import space as search_space
from fliqs_jax.training import (
  classification,
  moving_averages,
  sharding,
  steps,
  train_state,
)

OPTIONS = ('int2', 'int4', 'e4m3')
CLASSES, FEATURES, EXAMPLES = 3, 5, 8
LEARNING_RATE = 0.5


class Classifier(nn.Module):
  """Two dense layers with batch norm between them."""

  @nn.compact
  def __call__(self, x, train):
    dense = functools.partial(nn.Dense, **layers.dense_hooks())
    x = dense(6)(x)
    x = nn.BatchNorm(use_running_average=not train, momentum=0.7)(x)
    x = nn.Dropout(0.25, deterministic=not train)(nn.relu(x))
    return dense(CLASSES)(x)


class Statistics(nn.Module):
  """All kinds of statistics of Flax's layers, the others before the plain one."""

  @nn.compact
  def __call__(self, x, train):
    dense = functools.partial(nn.Dense, **layers.dense_hooks())
    x = dense(6, name='first')(x)
    x = nn.BatchNorm(use_running_average=True, name='frozen')(x)
    x = nn.SpectralNorm(nn.Dense(6), name='spectral')(x, update_stats=train)
    x = nn.BatchNorm(use_running_average=not train, momentum=0.7, name='plain')(x)
    x = nn.BatchNorm(use_running_average=not train, momentum=1.0, name='still')(x)
    return dense(CLASSES, name='last')(x)


def arguments(inputs):
  return train_state.Arguments((inputs,), {'train': False})


def bound(search, choices):
  return nest(search.space.layers, search.space.bind(choices))


class Search(NamedTuple):
  """A search of the classifier's formats."""

  space: search_space.SearchSpace
  cost_model: cost_models.CostModel
  controller: controller.Controller
  target: float


def make_search(network=Classifier):
  model, inputs = network(), jnp.zeros((1, FEATURES))
  found = discovery.discover(model, inputs, train=False)
  space = search_space.build_space(found, OPTIONS)
  cost_model = cost_models.get_cost_model('bops')
  target = cost_model.uniform(found, 'int4')
  policy = controller.policy_gradient_controller(
    space.valid,
    functools.partial(rewards.absolute, target=target, beta=1.0),
    controller.entropy_weight('cosine', 0.1, 0, 10),
    baseline='moving',
  )

  def init(mesh):
    optimizer, key = optax.sgd(LEARNING_RATE), jax.random.key(1)
    state = train_state.create_train_state(
      model, arguments(inputs), optimizer, policy, key
    )
    return jax.device_put(state, sharding.replicated(mesh))

  return Search(space, cost_model, policy, target), init


def make_batch(num_samples, seed=0):
  rng = np.random.default_rng(seed)
  shape = num_samples, EXAMPLES // num_samples
  return {
    'image': rng.normal(size=(*shape, FEATURES)).astype(np.float32),
    'label': rng.integers(CLASSES, size=shape).astype(np.int32),
  }


def take_steps(num_samples, num_devices, count=3, **options):
  """Returns the state and the metrics of each of the first steps."""
  mesh = sharding.make_mesh(num_samples, jax.devices()[:num_devices])
  search, init = make_search()
  step = steps.make_search_step(
    classification.classification(),
    search.space,
    search.cost_model,
    search.controller,
    mesh,
    num_samples=num_samples,
    **options,
  )
  state, metrics = init(mesh), []
  for seed in range(count):
    batch = make_batch(num_samples, seed)
    if options.get('held_out'):
      batch['reward'] = make_batch(num_samples, seed + 100)
    batch = jax.device_put(batch, sharding.batch_sharding(mesh))
    state, new = step(state, batch)
    metrics.append(jax.device_get(new))
  return jax.device_get(state.replace(key=None)), metrics


@pytest.mark.parametrize('num_samples', [1, 2, 4])
def test_a_step_traces_the_network_once(num_samples, monkeypatch):
  mesh = sharding.make_mesh(num_samples, jax.devices()[:1])
  search, init = make_search()
  state, calls = init(mesh), []
  dense = nn.Dense.__call__
  monkeypatch.setattr(
    nn.Dense, '__call__', lambda self, x: (calls.append(self.name), dense(self, x))[1]
  )
  step = steps.make_search_step(
    classification.classification(), search.space, search.cost_model,
    search.controller, mesh, num_samples=num_samples,
  )  # fmt: skip
  step.trace(state, make_batch(num_samples))
  assert calls == ['Dense_0', 'Dense_1']


def test_qualities_are_measured_with_averaged_weights():
  mesh, num_samples = sharding.make_mesh(2, jax.devices()[:1]), 2
  search, init = make_search()
  choices = jnp.ones(len(search.space.decisions), int)
  recorder = search.controller._replace(
    sample=lambda state, keys: jnp.tile(choices, (num_samples, 1)),
    update=lambda state, outcome, step: (outcome.qualities, {}),
    is_measured=lambda step: jnp.bool_(True),
  )
  task = classification.classification('minus_loss')
  step = steps.make_search_step(
    task, search.space, search.cost_model, recorder, mesh,
    num_samples=num_samples, averaged_steps=2,
  )  # fmt: skip
  state, formats = init(mesh), bound(search, choices)
  apply = jax.jit(functools.partial(state.apply_fn, train=True, mutable=True))
  average = state.params
  zeros = jax.tree.map(jnp.zeros_like, average)
  state = state.replace(controller=jnp.zeros(num_samples), averaged_params=zeros)
  for weight in (1, 1 / 2, 1 / 2, 1 / 2):  # the first is that of a mean of one
    batch = make_batch(num_samples, int(state.step))
    half = {k: v[:, :2].reshape(-1, *v.shape[2:]) for k, v in batch.items()}
    key = jax.random.fold_in(state.key, state.step)
    logits, _ = apply(
      {'params': average, FORMATS: formats, **state.model_stats},
      half['image'], rngs={'dropout': key},
    )  # fmt: skip
    expected = jnp.mean(task.quality(logits, half))
    batch = jax.device_put(batch, sharding.batch_sharding(mesh))
    state, _ = step(jax.tree.map(jnp.copy, state), batch)
    np.testing.assert_allclose(state.controller, [expected] * num_samples, rtol=1e-5)
    average = optax.incremental_update(state.params, average, weight)
  chex.assert_trees_all_close(state.averaged_params, average, rtol=1e-6)


@pytest.mark.parametrize(
  'num_samples, num_devices, shape',
  [
    (1, 1, (1, 1, 1)),
    (4, 1, (1, 1, 1)),
    (1, 2, (1, 2, 1)),
    (2, 2, (2, 1, 1)),
    (6, 2, (2, 1, 1)),
  ],
)
def test_mesh(num_samples, num_devices, shape):
  mesh = sharding.make_mesh(num_samples, jax.devices()[:num_devices])
  assert mesh.axis_names == ('sample', 'data', 'fsdp')
  assert mesh.devices.shape == shape


@pytest.mark.parametrize('num_samples', [1, 2, 4])
def test_same_search_on_one_device_and_on_two(num_samples):
  one_state, one = take_steps(num_samples, 1)
  two_state, two = take_steps(num_samples, 2)
  for a, b in zip(one, two):
    np.testing.assert_array_equal(a['choices'], b['choices'])
    assert a['loss'] == pytest.approx(b['loss'], rel=1e-5)
  # Sums over examples in another order, through three steps.
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-5),
    one_state.params,
    two_state.params,
  )


def test_step_takes_the_mean_gradient_of_its_samples():
  num_samples = 2
  search, init = make_search()
  mesh = sharding.make_mesh(num_samples, jax.devices()[:1])
  state = init(mesh)
  batch = jax.tree.map(jnp.asarray, make_batch(num_samples))
  step_key = jax.random.fold_in(state.key, 0)
  task = classification.classification()

  def sample_loss(params, choices, s):
    _, key = jax.random.split(jax.random.fold_in(step_key, s))
    outputs, stats = state.apply_fn(
        {'params': params, FORMATS: bound(search, choices), **state.model_stats},
        batch['image'][s], train=True, mutable=['batch_stats', 'quant_stats'],
        rngs={'dropout': key},
    )  # fmt: skip
    one = {'label': batch['label'][s]}
    return task.loss(outputs, one), (stats, task.quality(outputs, one))

  policy_keys = jnp.stack(
    [jax.random.split(jax.random.fold_in(step_key, s))[0] for s in range(num_samples)]
  )
  choices = search.controller.sample(state.controller, policy_keys)
  gradient = jax.jit(jax.value_and_grad(sample_loss, has_aux=True))
  results = [gradient(state.params, choices[s], s) for s in range(num_samples)]
  mean = lambda *trees: jax.tree.map(lambda *leaves: sum(leaves) / num_samples, *trees)
  gradients = mean(*(gradient for _, gradient in results))
  expected = jax.tree.map(lambda p, g: p - LEARNING_RATE * g, state.params, gradients)
  expected_stats = mean(*(stats for (_, (stats, _)), _ in results))
  costs = search.cost_model(search.space, np.asarray(choices))
  qualities = np.array([quality for (_, (_, quality)), _ in results])

  new_state, (metrics,) = take_steps(num_samples, 1, count=1)
  np.testing.assert_array_equal(metrics['choices'], choices)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
  jax.tree.map(close, new_state.params, expected)
  jax.tree.map(close, new_state.model_stats, expected_stats)
  close(metrics['reward'], np.mean(qualities - abs(costs / search.target - 1)))
  close(metrics['cost'], np.mean(costs))


def test_held_out_quality_leaves_the_weights_alone():
  own_state, own = take_steps(2, 1, count=1)
  held_state, held = take_steps(2, 1, count=1, held_out=True)
  # Two programs, which may sum in another order.
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7)
  jax.tree.map(close, own_state.params, held_state.params)
  close(own[0]['loss'], held[0]['loss'])
  assert own[0]['quality'] == own[0]['accuracy'] != held[0]['quality']


def test_activations_are_quantized_from_the_delay_on():
  # Nothing is known of the activations at step 0, so the first step is alike.
  _, early = take_steps(1, 1, count=3, activation_delay=0)
  _, late = take_steps(1, 1, count=3, activation_delay=2)
  assert early[0]['loss'] == late[0]['loss']
  assert early[1]['loss'] != late[1]['loss']


def test_train_step_with_float32_is_plain_training():
  mesh = sharding.make_mesh(1, jax.devices()[:1])
  search, init = make_search()
  space = search_space.uniform_space(search.space.layers, 'float32')
  step = steps.make_train_step(classification.classification(), space, mesh)
  state, batch = init(mesh), make_batch(1)
  key = jax.random.split(jax.random.fold_in(state.key, 0), 1)[0]

  def loss(params):
    logits, _ = state.apply_fn(
        {'params': params, **state.model_stats}, batch['image'][0], train=True,
        mutable=['batch_stats', 'quant_stats'], rngs={'dropout': key},
    )  # fmt: skip
    return optax.softmax_cross_entropy_with_integer_labels(
      logits, batch['label'][0]
    ).mean()

  expected = jax.tree.map(
    lambda p, g: p - LEARNING_RATE * g, state.params, jax.grad(loss)(state.params)
  )
  new_state, _ = step(state, jax.device_put(batch, sharding.batch_sharding(mesh)))
  jax.tree.map(
      functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
      jax.device_get(new_state.params), expected,
  )  # fmt: skip


def reestimate(search, state, mesh, seeds):
  """Returns the new statistics, what stays, and the network's values on each batch.

  The values are all layers' outputs `[EXAMPLES, ...]`, without dropout.
  """
  step = steps.make_statistics_step(classification.classification(), search.space, mesh)
  whole, choices = sharding.replicated(mesh), jnp.zeros(2, jnp.int32)

  def update(batch, old):
    return jax.device_get(
      step(state, *jax.device_put((choices, batch, old), placements))
    )

  placements = whole, sharding.batch_sharding(mesh), whole
  batches = [make_batch(2, seed) for seed in seeds]
  new, kept = moving_averages.reestimate(
    update, jax.device_get(state.batch_stats), batches
  )
  variables = {
      'params': state.params, FORMATS: bound(search, choices), **state.model_stats,
  }  # fmt: skip
  apply = jax.jit(
    functools.partial(
      state.apply_fn, train=False, capture_intermediates=True, mutable=['intermediates']
    )
  )
  outputs = [
    apply(variables, batch['image'].reshape(EXAMPLES, FEATURES))[1]['intermediates']
    for batch in batches
  ]
  return new, kept, outputs


@pytest.mark.parametrize('num_devices', [1, 2])
def test_statistics_step_gives_the_batch_statistics(num_devices):
  mesh = sharding.make_mesh(2, jax.devices()[:num_devices])
  search, init = make_search()
  new, kept, (outputs,) = reestimate(search, init(mesh), mesh, [0])
  assert not kept
  # What batch norm sees: the first layer's outputs for all examples together.
  (hidden,) = outputs['Dense_0']['__call__']
  close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
  close(new['BatchNorm_0']['mean'], np.mean(hidden, axis=0))
  close(new['BatchNorm_0']['var'], np.var(hidden, axis=0))


def test_statistics_that_are_no_moving_averages_stay():
  mesh = sharding.make_mesh(2, jax.devices()[:1])
  search, init = make_search(Statistics)
  state = init(mesh)
  frozen = {'mean': jnp.linspace(-1, 1, 6), 'var': jnp.linspace(0.5, 4, 6)}
  old = state.batch_stats | {
    'frozen': jax.device_put(frozen, sharding.replicated(mesh))
  }
  state = state.replace(batch_stats=old)
  new, kept, outputs = reestimate(search, state, mesh, [0, 1])
  vector, sigma = 'Dense_0/kernel/u', 'Dense_0/kernel/sigma'
  assert kept == [
    'frozen/mean', 'frozen/var', f'spectral/{vector}', 'still/mean', 'still/var',
  ]  # fmt: skip
  for name in ('frozen', 'still'):
    jax.tree.map(np.testing.assert_array_equal, new[name], old[name])
  np.testing.assert_array_equal(new['spectral'][vector], old['spectral'][vector])
  # The network behind them is as it was: none of them was another while it ran.
  hidden = np.stack([output['spectral']['__call__'][0] for output in outputs])
  close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
  close(new['plain']['mean'], np.mean(hidden, axis=(0, 1)))
  close(new['plain']['var'], np.mean(np.var(hidden, axis=1), axis=0))
  # The singular value follows from the weights, and is the same for all batches.
  kernel, u = state.params['Dense_0']['kernel'], old['spectral'][vector][0]
  v = kernel @ u / np.linalg.norm(kernel @ u)
  close(new['spectral'][sigma], np.linalg.norm(v @ kernel))


def test_eval_step_counts_what_is_not_padding():
  mesh = sharding.make_mesh(1, jax.devices()[:2])
  search, init = make_search()
  step, state = (
    steps.make_eval_step(classification.classification(), search.space, mesh),
    init(mesh),
  )
  batch = {key: value[0] for key, value in make_batch(1).items()}
  mask = np.arange(EXAMPLES) < 5
  choices = jax.device_put(jnp.ones(2, jnp.int32), sharding.replicated(mesh))
  sums = step(
    state,
    choices,
    jax.device_put({**batch, 'mask': mask}, sharding.eval_sharding(mesh)),
  )
  logits = jax.jit(functools.partial(state.apply_fn, train=False))(
      {
          'params': state.params, FORMATS: bound(search, choices),
          **state.model_stats,
      },
      batch['image'][:5],
  )  # fmt: skip
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch['label'][:5])
  assert sums['num_examples'] == 5
  assert sums['accuracy'] == np.sum(np.argmax(logits, -1) == batch['label'][:5])
  assert sums['loss'] == pytest.approx(float(losses.sum()), rel=1e-5)


@pytest.mark.parametrize('smoothing', [0.0, 0.1])
def test_task_against_arithmetic(smoothing):
  logits = jnp.log(jnp.array([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]]))
  batch = {'label': jnp.array([0, 1])}
  targets = np.eye(3)[[0, 1]] * (1 - smoothing) + smoothing / 3
  losses = -(targets * np.asarray(logits)).sum(axis=1)
  task = classification.classification('accuracy', smoothing)
  assert task.loss(logits, batch) == pytest.approx(losses.mean(), rel=1e-6)
  assert task.quality(logits, batch) == 0.5
  minus_loss = classification.classification('minus_loss', smoothing).quality(
    logits, batch
  )
  assert minus_loss == pytest.approx(np.log([0.7, 0.3]).mean(), rel=1e-6)


@pytest.mark.parametrize('smoothing', [0.0, 0.1])
def test_task_of_soft_labels_against_arithmetic(smoothing):
  logits = jnp.log(jnp.array([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]]))
  labels = np.array([[0.8, 0.2, 0.0], [0.0, 0.9, 0.1]], np.float32)
  targets = labels * (1 - smoothing) + smoothing / 3
  losses = -(targets * np.asarray(logits)).sum(axis=1)
  batch, task = {'label': labels}, classification.classification('accuracy', smoothing)
  assert task.loss(logits, batch) == pytest.approx(losses.mean(), rel=1e-6)
  assert task.quality(logits, batch) == 0.5
  assert task.metrics(logits, batch) == {'accuracy': 0.5}


def test_certain_soft_labels_are_labels():
  rng = np.random.default_rng(0)
  logits, labels = rng.normal(size=(20, 4)), rng.integers(4, size=20)
  for quality in ('accuracy', 'minus_loss'):
    task = classification.classification(quality, 0.1)
    for function in (task.loss, task.quality):
      assert function(logits, {'label': labels}) == function(
        logits, {'label': np.eye(4, dtype=np.float32)[labels]}
      )


class WithAuxiliaryHeads(nn.Module):
  """A linear classifier with two more that only training knows."""

  @nn.compact
  def __call__(self, x, train):
    if train or self.is_initializing():
      for name in ('one', 'two'):
        self.sow('intermediates', 'aux_logits', nn.Dense(CLASSES, name=name)(x))
      self.sow('intermediates', 'other', x)
    dense = functools.partial(nn.Dense, **layers.dense_hooks())
    return dense(CLASSES, name='classifier')(x)


def test_auxiliary_heads_train_on_a_part_of_the_same_loss():
  model, inputs = WithAuxiliaryHeads(), jnp.zeros((1, FEATURES))
  found = discovery.discover(model, inputs, train=False)
  space = search_space.uniform_space(found, 'float32')
  mesh = sharding.make_mesh(1, jax.devices()[:1])
  state = jax.device_put(
    train_state.create_train_state(
      model, arguments(inputs), optax.sgd(LEARNING_RATE), None, jax.random.key(1)
    ),
    sharding.replicated(mesh),
  )
  params, batch, weight = jax.device_get(state.params), make_batch(1), 0.3
  images, targets = batch['image'][0], np.eye(CLASSES)[batch['label'][0]]
  loss = 0.0
  expected = {}
  for name, part in (('classifier', 1.0), ('one', weight), ('two', weight)):
    # The gradient of softmax and cross entropy, written out.
    logits = images @ params[name]['kernel']
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    loss -= part * (targets * np.log(probabilities)).sum(axis=1).mean()
    error = part * (probabilities - targets) / EXAMPLES
    expected[name] = {
      'kernel': params[name]['kernel'] - LEARNING_RATE * images.T @ error,
      'bias': params[name]['bias'] - LEARNING_RATE * error.sum(axis=0),
    }
  task = classification.classification(auxiliary_weight=weight)
  step = steps.make_train_step(task, space, mesh)
  new_state, metrics = step(state, jax.device_put(batch, sharding.batch_sharding(mesh)))
  assert metrics['loss'] == pytest.approx(loss, rel=1e-5)
  jax.tree.map(
      functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6),
      jax.device_get(new_state.params), expected,
  )  # fmt: skip


# Two samples of two devices each: more than the two devices of this process.
ON_FOUR_DEVICES = """
import jax
jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', 4)
import numpy as np
from fliqs_jax.training import sharding, steps

mesh = sharding.make_mesh(2)
assert mesh.devices.shape == (2, 2, 1)
rng = np.random.default_rng(0)
x, w = rng.normal(size=(2, 8, 6)), rng.normal(size=(6, 4))

def mean_gradient(w, x):
  def one_sample(w, x):
    return jax.grad(lambda w: ((x @ w) ** 2).mean())(w), x.sum()
  return steps._mean_over_samples(one_sample, mesh, w, x)

shardings = sharding.replicated(mesh), sharding.batch_sharding(mesh)
mean, stacked = jax.jit(mean_gradient, in_shardings=shardings)(w, x)
assert mean.sharding.is_fully_replicated
expected = np.mean([2 * a.T @ (a @ w) / 32 for a in x], axis=0)
np.testing.assert_allclose(mean, expected, rtol=1e-5)
np.testing.assert_allclose(stacked, x.sum(axis=(1, 2)), rtol=1e-5)
# Half of the gradient goes over the samples.
compiled = jax.jit(mean_gradient, in_shardings=shardings).lower(w, x).compile()
assert 'f32[3,4]' in compiled.as_text()
"""


def test_gradient_of_samples_that_are_split_over_devices():
  subprocess.run(
    [sys.executable, '-c', ON_FOUR_DEVICES], check=True, cwd=ROOT, timeout=300
  )
