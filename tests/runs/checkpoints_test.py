"""Checkpoints: what is saved comes back, and damage is noticed wherever it is."""

import logging
import pathlib
import re
import shutil

from etils import epath
from flax import linen as nn
import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fliqs_jax.errors import RunError
from fliqs_jax.runs import checkpoints
from fliqs_jax.runs.checkpoints import Checkpoints
from fliqs_jax.training.train_state import Arguments, create_train_state


class Network(nn.Module):
  @nn.compact
  def __call__(self, inputs, train):
    return nn.Dense(40)(inputs)


def make_state(step=0):
  state = create_train_state(
    Network(),
    Arguments((jnp.zeros((1, 3)),), {'train': False}),
    optax.adam(0.1),
    None,
    jax.random.key(7),
  )
  return state.replace(
    step=jnp.int32(step), params=jax.tree.map(lambda a: a + step, state.params)
  )


def make_batches(position=0):
  batches = iter(grain.MapDataset.range(100).to_iter_dataset())
  for _ in range(position):
    next(batches)
  return batches


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  """A workdir with checkpoints of steps 1 and 2, whose data are at 10 and 20."""
  workdir = epath.Path(tmp_path_factory.mktemp('saved'))
  with Checkpoints(workdir) as kept:
    for step in (1, 2):
      kept.save(make_state(step), make_batches(10 * step))
  return workdir


@pytest.fixture
def workdir(saved, tmp_path):
  shutil.copytree(saved, tmp_path / 'run')
  return epath.Path(tmp_path / 'run')


def restore(workdir):
  batches = make_batches()
  with Checkpoints(workdir) as kept:
    state = kept.restore(make_state(), batches)
  return state, next(batches)


def assert_same(state, expected):
  for found, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(expected)):
    assert (found == wanted).all()


def files_of(workdir, step):
  folder = pathlib.Path(workdir / checkpoints.FOLDER / str(step))
  return sorted(path for path in folder.rglob('*') if path.is_file())


def remove(path, rng):
  path.unlink()


def truncate(path, rng):
  path.write_bytes(path.read_bytes()[: rng.integers(path.stat().st_size)])


def scramble(path, rng):
  content = np.frombuffer(path.read_bytes(), np.uint8).copy()
  at = rng.integers(content.size, size=4)
  content[at] ^= rng.integers(1, 256, size=4).astype(np.uint8)
  path.write_bytes(content.tobytes())


def test_what_is_saved_comes_back(workdir):
  state, example = restore(workdir)
  assert_same(state, make_state(2))
  assert example == 20


def test_whoever_reads_sees_no_warning(workdir, caplog):
  with Checkpoints(workdir, read_only=True) as kept:
    kept.restore_variables(make_state())
  assert [r.message for r in caplog.records if r.levelno >= logging.WARNING] == []


def test_damage_anywhere_is_noticed_or_harmless(saved, tmp_path, caplog):
  rng = np.random.default_rng(0)
  damages = (remove, truncate, scramble)
  fell_back = set()
  for index, file in enumerate(files_of(saved, 2)):
    damage = damages[index % 3]
    workdir = epath.Path(tmp_path / str(index))
    shutil.copytree(saved, workdir)
    path = pathlib.Path(workdir) / file.relative_to(saved)
    if not path.stat().st_size:
      continue
    damage(path, rng)
    state, example = restore(workdir)
    step = int(state.step)
    assert_same(state, make_state(step))
    assert example == 10 * step, (damage, file)
    if step == 1:
      fell_back.add(file.relative_to(saved).parts[2])
    reasons = [r.message for r in caplog.records if r.name == checkpoints.__name__]
    assert not re.search('<|tensorstore|TensorStore|driver', str(reasons))
    caplog.clear()
  assert {'variables', 'training', 'batches', 'fingerprints'} <= fell_back


def test_a_changed_value_is_noticed(workdir, monkeypatch):
  # As a flipped bit would that the file format does not notice.
  folder = workdir / checkpoints.FOLDER
  changed = make_state(2)
  changed = changed.replace(
    params=jax.tree.map(lambda a: a.at[0].add(1e-6), changed.params)
  )
  with monkeypatch.context() as context:
    context.setattr(checkpoints, '_fingerprint', lambda _: jnp.uint32(1))
    shutil.rmtree(folder / '2')
    with Checkpoints(workdir) as kept:
      kept.save(changed, make_batches(20))
  assert_same(restore(workdir)[0], make_state(1))


def test_fallback_is_logged_and_its_step_can_be_saved_again(workdir, caplog):
  for path in files_of(workdir, 2):
    path.unlink()
  state, example = restore(workdir)
  assert (int(state.step), example) == (1, 10)
  (record,) = (r for r in caplog.records if r.name == 'fliqs_jax.runs.checkpoints')
  assert record.message.startswith('Checkpoint 2 in ') and 'damaged' in record.message
  with Checkpoints(workdir) as kept:
    kept.save(make_state(2), make_batches(20))
  assert_same(restore(workdir)[0], make_state(2))


def test_evaluation_falls_back_and_deletes_nothing(workdir):
  for path in files_of(workdir, 2):
    if 'variables' in path.parts:
      path.write_bytes(b'')
  with Checkpoints(workdir, read_only=True) as kept:
    state = kept.restore_variables(make_state())
  jax.tree.map(np.testing.assert_array_equal, state.params, make_state(1).params)
  assert files_of(workdir, 2)


def test_no_sound_checkpoint_is_an_error_and_not_a_fresh_start(workdir):
  for step in (1, 2):
    for path in files_of(workdir, step):
      path.write_bytes(b'')
  with pytest.raises(RunError, match='step 2: .*step 1: .*name another --workdir'):
    restore(workdir)
  assert files_of(workdir, 1) and files_of(workdir, 2)


def test_a_folder_that_cannot_be_written(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(RunError, match='cannot write a checkpoint in'):
    Checkpoints(epath.Path(tmp_path / 'file'))


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16, jnp.int32, jnp.bool_])
def test_fingerprints_tell_single_changes_apart(dtype):
  array = jnp.arange(64).astype(dtype)
  expected = checkpoints._fingerprint([array, array])
  for index in range(64):
    changed = array.at[index].set((array[index] == 0).astype(dtype))
    assert checkpoints._fingerprint([array, changed]) != expected
    assert checkpoints._fingerprint([changed, array]) != expected
