"""Moving averages told from other statistics, against updates that are written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fliqs_jax.training import moving_averages

BATCH = np.array([0.25, -3.0, 40.0], np.float32)


def average(old, momentum=0.9, batch=BATCH):
  return momentum * old + (1 - momentum) * batch


def normalised(old):
  return old / (jnp.linalg.norm(old) + 1e-12)


def measure(update, old):
  """Returns which leaves are found, and the statistics of the one batch."""
  update = jax.jit(update)
  new, _ = moving_averages.reestimate(
    lambda batch, old: jax.device_get(update(old)), old, [None]
  )
  return moving_averages.find(lambda old: jax.device_get(update(old)), old).average, new


@pytest.mark.parametrize('momentum', [0.0, 0.5, 0.9, 0.99, 0.999])
@pytest.mark.parametrize('size', [1.0, 1e-6, 1e6])
def test_averages_of_any_momentum(momentum, size):
  batch = size * BATCH
  old = np.full_like(batch, np.nan)  # one bad batch spoils it for ever
  found, told = measure(lambda old: average(old, momentum, batch), old)
  assert found == [True]
  np.testing.assert_allclose(told, batch, rtol=1e-6 / (1 - momentum))


@pytest.mark.parametrize(
  'update',
  [
    lambda old: old,
    lambda old: average(old, 1.0),
    lambda old: old + 1,
    lambda old: average(old, 1.1),
    lambda old: average(old, -0.5),
    lambda old: average(old, jnp.array([0.9, 0.9, 0.5])),
    lambda old: jnp.maximum(old, BATCH),
    lambda old: jnp.minimum(old, BATCH),
    lambda old: jnp.maximum(old, 3.0),
    normalised,
    lambda old: old / jnp.linalg.norm(old),
    lambda old: average(old, batch=BATCH * np.nan),
    lambda old: average(old, batch=BATCH * np.inf),
  ],
)
def test_other_updates_are_left_alone(update):
  old = np.array([1.0, 2.0, 50.0], np.float32)
  found, new = measure(update, old)
  assert found == [False]
  np.testing.assert_array_equal(new, old)


def test_leaves_that_change_the_network_hide_no_average():
  old = {
    'a': np.ones(3, np.float32), 'frozen': np.full(3, 2.0, np.float32),
    'count': np.int32(5), 'flag': np.array(True), 'none': np.zeros(0, np.float32),
    'vector': np.full(3, 0.5, np.float32), 'z': np.ones(3, np.float32),
  }  # fmt: skip

  def update(old):
    behind = BATCH / jnp.sqrt(old['frozen'] + 1e-5) + normalised(old['vector'])
    return {
      'a': average(old['a']), 'frozen': old['frozen'], 'count': old['count'] + 1,
      'flag': old['flag'], 'none': old['none'], 'vector': normalised(old['vector']),
      'z': average(old['z'], 0.99, behind),
    }  # fmt: skip

  found, told = measure(update, old)
  names = np.array(sorted(old))
  assert list(names[found]) == ['a', 'z']
  np.testing.assert_allclose(told['a'], BATCH, rtol=1e-5)
  behind = BATCH / np.sqrt(2 + 1e-5) + 1 / np.sqrt(3)
  np.testing.assert_allclose(told['z'], behind, rtol=1e-4)


def test_batch_norm_alone_takes_one_probe():
  calls = []

  def update(old):
    calls.append(old)
    return jax.tree.map(average, old)

  assert np.all(moving_averages.find(update, [BATCH] * 9).average)
  assert len(calls) == 3


def test_what_is_not_finite_is_not_taken():
  old = {'mean': np.ones(3, np.float32), 'overflowing': np.ones(3, np.float32)}

  def update(batch, old):
    values = {'mean': batch, 'overflowing': batch * np.float32(np.inf)}
    return jax.tree.map(lambda old, batch: average(old, batch=batch), old, values)

  batches = [BATCH, np.full_like(BATCH, np.nan), 3 * BATCH]
  new, kept = moving_averages.reestimate(update, old, batches)
  # Of three batches one is bad; the mean is over the two others.
  np.testing.assert_allclose(new['mean'], 2 * BATCH, rtol=1e-5)
  assert kept == ['overflowing']
  np.testing.assert_array_equal(new['overflowing'], np.ones(3))
