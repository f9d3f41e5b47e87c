"""Averages of steps, and what is said of steps whose numbers are not finite."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fliqs_jax.training import health, sharding, steps
from fliqs_jax.training.train_state import TrainState


def formats_of(choices):
  return {
    f'layer{i}': {'weights': f'int{c}', 'activations': f'int{c}'}
    for i, c in enumerate(choices)
  }


def row(loss=1.0, norm=1.0, skipped=None, sample_loss=(1.0, 1.0)):
  content = {
    'loss': jnp.float32(loss),
    'gradient_norm': jnp.float32(norm),
    'sample_loss': jnp.asarray(sample_loss),
    'choices': jnp.array([[2, 8], [4, 4]]),
  }
  return content if skipped is None else {**content, 'skipped_in_a_row': skipped}


def test_mean_of_scalars():
  rows = [row(loss=1.0, norm=2.0), row(loss=2.0, norm=4.0)]
  assert health.average(rows, 2, 0, formats_of) == {'loss': 1.5, 'gradient_norm': 3.0}


@pytest.mark.parametrize(
  'bad, expected',
  [
    (
      {'loss': np.nan, 'sample_loss': (1.0, np.nan)},
      'loss is nan at step 9, sample 1 (int4: layer0, layer1)',
    ),
    (
      {'norm': np.inf},
      'gradient_norm is inf at step 9, sample 0 (int2: layer0; int8: layer1), '
      'sample 1 (int4: layer0, layer1)',
    ),
  ],
)
def test_the_step_and_the_formats_are_named(bad, expected):
  with pytest.raises(FloatingPointError) as error:
    health.average([row(), row(**bad), row()], 10, 0, formats_of)
  assert str(error.value) == expected


def test_a_reward_that_is_not_finite_is_unsound():
  bad = {**row(), 'reward': jnp.float32(np.nan)}
  with pytest.raises(FloatingPointError, match='^reward is nan at step 1, sample 0'):
    health.average([bad], 1, 0, formats_of)
  skipped = {**bad, 'skipped_in_a_row': 1}
  assert health.average([skipped], 1, 1, formats_of) == {'skipped_steps': 1}


def test_fixed_formats_have_no_choices():
  bad = row(loss=np.inf)
  del bad['choices']
  with pytest.raises(FloatingPointError, match='^loss is inf at step 1$'):
    health.average([bad], 1, 0, formats_of)


def test_skipped_steps_are_counted_and_left_out():
  rows = [row(loss=1, skipped=0), row(loss=np.nan, skipped=1), row(loss=3, skipped=0)]
  averaged = health.average(rows, 3, 1, formats_of)
  assert averaged == {'loss': 2.0, 'gradient_norm': 1.0, 'skipped_steps': 1}
  assert health.average(rows[1:2], 2, 1, formats_of) == {'skipped_steps': 1}


def test_too_many_in_a_row_stop_the_run():
  rows = [row(loss=np.nan, skipped=count) for count in (2, 3)]
  with pytest.raises(FloatingPointError, match='at step 6,'):
    health.average(rows, 6, 2, formats_of)
  health.average(rows, 6, 3, formats_of)


def test_an_unsound_step_changes_nothing_but_the_counts():
  mesh = sharding.make_mesh(1)
  zero = lambda: jnp.zeros((), jnp.int32)
  state = TrainState(
      step=zero(), apply_fn=None, params={'w': jnp.ones(3)}, tx=None, opt_state={},
      batch_stats={}, quant_stats={}, controller=None, skipped=zero(),
      key=jax.random.key(0),
  )  # fmt: skip

  def step(state, batch):
    params = jax.tree.map(lambda a: a + batch.sum(), state.params)
    metrics = {'loss': batch.sum(), 'gradient_norm': jnp.float32(1)}
    return state.replace(step=state.step + 1, params=params), metrics

  guarded = steps.skip_unsound(step, mesh)
  weights, counts = [], []
  for value in (1.0, np.nan, np.inf, 2.0):
    state, metrics = guarded(state, jnp.full((1, 2), value))
    weights.append(float(state.params['w'][0]))
    counts.append(int(metrics['skipped_in_a_row']))
  assert weights == [3.0, 3.0, 3.0, 7.0]
  assert counts == [0, 1, 2, 0]
  assert int(state.step) == 4
