"""The same search on one device, on two, and on two processes of four."""

import functools
import itertools
import json

import child_functions
from hypothesis import given
from hypothesis import strategies as st
import jax
import numpy as np
import pytest
import whole_runs

from fliqs_jax.data import pipeline
from fliqs_jax.errors import ConfigError
from fliqs_jax.runs import distributed
from fliqs_jax.training import sharding

NUM_STEPS = 8
FIELDS = {
  'num_steps': NUM_STEPS,
  'checkpoint_every': 2,
  'search__num_samples': 4,
  'optimizer__learning_rate': 1e-3,
  'optimizer__warmup_steps': 0,
}


class PartOfDevices:
  """The sharding of `[S, B]` on a mesh, as one process sees it."""

  def __init__(self, num_samples, num_devices, num_processes, process):
    self.rows = sharding.sample_axis_size(num_samples, num_devices, num_processes)
    local = num_devices // num_processes
    self.devices = range(process * local, (process + 1) * local)
    self.columns = num_devices // self.rows

  def addressable_devices_indices_map(self, shape):
    indices = {}
    for device in self.devices:
      row, column = divmod(device, self.columns)
      if len(shape) == 1:
        parts = [(device, self.rows * self.columns)]
      else:
        parts = [(row, self.rows), (column, self.columns)]
      indices[device] = tuple(
        slice(i * size // n, (i + 1) * size // n) for (i, n), size in zip(parts, shape)
      )
    return indices


topologies = st.tuples(
  st.integers(1, 12), st.integers(1, 6), st.integers(1, 6)
)  # samples, processes, devices of each


@given(topologies)
def test_a_process_holds_whole_samples_or_a_part_of_one(topology):
  num_samples, num_processes, local = topology
  num_devices = num_processes * local
  rows = sharding.sample_axis_size(num_samples, num_devices, num_processes)
  assert num_samples % rows == 0 and num_devices % rows == 0
  columns = num_devices // rows
  for process in range(num_processes):
    held = range(process * local, (process + 1) * local)
    cells = {divmod(device, columns) for device in held}
    rectangle = itertools.product(*map(set, zip(*cells)))
    assert cells == set(rectangle)


@pytest.mark.parametrize(
  'num_samples, num_devices, num_processes, rows',
  [
    (4, 1, 1, 1),
    (4, 8, 2, 4),
    (4, 8, 8, 4),
    (2, 8, 1, 2),
    (16, 8, 2, 8),
    (3, 6, 2, 1),  # three samples on two processes: each holds a half of all
  ],
)
def test_sample_axis(num_samples, num_devices, num_processes, rows):
  assert sharding.sample_axis_size(num_samples, num_devices, num_processes) == rows


@pytest.mark.parametrize('num_samples', [1, 2, 4, 8])
@pytest.mark.parametrize('num_devices, num_processes', [(8, 2), (8, 4), (4, 4)])
def test_processes_load_the_batch_of_one(
  tiny_config, num_samples, num_devices, num_processes
):
  config = tiny_config.copy_and_resolve_references()
  config.search.num_samples = num_samples
  config.input.train_split = 'train[:50]'  # epochs end within batches
  builder = pipeline.find_builder(config)
  whole = pipeline.train_batches(config, builder, 3)
  expected = [next(whole) for _ in range(3)]
  shape = expected[0]['label'].shape
  found = [np.full_like(batch['label'], -1) for batch in expected]
  for process in range(num_processes):
    part = PartOfDevices(num_samples, num_devices, num_processes, process)
    batches = pipeline.train_batches(config, builder, 3, part)
    for batch, labels, target in zip(batches, found, expected):
      cells = part.addressable_devices_indices_map(shape).values()
      rows, columns = (
        sorted({i for cell in cells for i in range(cell[axis].start, cell[axis].stop)})
        for axis in (0, 1)
      )
      held = np.ix_(rows, columns)
      np.testing.assert_array_equal(batch['image'], target['image'][held])
      labels[held] = batch['label']
  jax.tree.map(np.testing.assert_array_equal, found, [b['label'] for b in expected])


@pytest.mark.parametrize('num_examples', [1, 100, 128, 130])
def test_processes_evaluate_every_example_once(tiny_config, num_examples):
  config = tiny_config.copy_and_resolve_references()
  config.input.eval_split = f'test[:{num_examples}]'
  builder = pipeline.find_builder(config)
  (*whole,) = pipeline.eval_batches(config, builder)
  parts = [
    list(pipeline.eval_batches(config, builder, PartOfDevices(4, 8, 4, process)))
    for process in range(4)
  ]
  assert sum(batch['mask'].sum() for batch in whole) == num_examples
  for index, batch in enumerate(whole):
    together = [part[index] for part in parts]
    for key in batch:
      joined = np.concatenate([part[key] for part in together])
      np.testing.assert_array_equal(joined, batch[key])


@pytest.fixture(scope='module')
def trajectories(data_dir, tmp_path_factory):
  """The steps and the result of one search on several topologies."""
  base = tmp_path_factory.mktemp('topologies')
  found = {}
  for num_processes, num_devices in [(1, 1), (1, 2), (2, 4)]:
    folder = base / f'{num_processes}x{num_devices}'
    folder.mkdir()
    kwargs = {
      **FIELDS,
      'num_devices': num_devices,
      'prepare': functools.partial(child_functions.record_steps, folder),
    }
    common = folder / 'run', data_dir, base / 'cache', folder / 'log'
    if num_processes == 1:
      processes = [whole_runs.start(*common, **kwargs)]
    else:
      processes = whole_runs.start_several(num_processes, *common, **kwargs)
    assert list(map(whole_runs.finish, processes)) == [0] * num_processes
    recorded = [np.load(folder / f'{step + 1}.npz') for step in range(NUM_STEPS)]
    found[num_processes, num_devices] = folder / 'run', recorded
  return found


def test_every_topology_takes_the_same_steps(trajectories):
  workdir, reference = trajectories[1, 1]
  expected = json.loads(whole_runs.read_result(workdir))
  unit = 2.0**-24  # half the spacing of float32 around 1
  # A gradient is a mean over what the batch has at most: examples and positions.
  num_terms = 32 * 4 * 4
  for topology, (other, recorded) in trajectories.items():
    result = json.loads(whole_runs.read_result(other))
    assert result['formats'] == expected['formats'], topology
    assert result['eval']['num_examples'] == 360
    assert result['eval']['loss'] == pytest.approx(expected['eval']['loss'], rel=1e-6)
    bound = 0
    for one, several in zip(reference, recorded):
      np.testing.assert_array_equal(several['choices'], one['choices'])
      # What a step can add: the rounding of the weights, and, times the learning rate
      # (ten of them, with a momentum of 0.9), that of sums in another order.
      bound = bound + unit * (1 + 10 * 1e-3 * num_terms * one['norm'])
      error = np.abs(several['weights'] - one['weights'])
      assert (error <= bound * np.maximum(1, np.abs(one['weights']))).all(), topology


def test_two_processes_stop_and_die_together_and_go_on(
  trajectories, data_dir, tmp_path
):
  uninterrupted = trajectories[2, 4][0]
  workdir, cache = tmp_path / 'run', uninterrupted.parents[1] / 'cache'

  def start(log, prepare=child_functions.slow_steps):
    return whole_runs.start_several(
        2, workdir, data_dir, cache, tmp_path / log, num_devices=4, prepare=prepare,
        **FIELDS,
    )  # fmt: skip

  def wait_for_line(processes, known):
    history = workdir / 'history.jsonl'
    whole_runs.wait_until(
      lambda: history.exists() and len(history.read_text().splitlines()) > known,
      *processes,
    )

  def statuses(processes):
    return list(map(whole_runs.finish, processes))

  processes = start('stopped')
  wait_for_line(processes, known=0)
  processes[1].terminate()
  assert statuses(processes) == [75, 75]
  last = [(tmp_path / f'stopped{i}').read_text().splitlines()[-1] for i in range(2)]
  assert last[0] == last[1] and 'stopped by SIGTERM at step' in last[0]

  processes = start('killed')
  wait_for_line(processes, known=len(whole_runs.read_history(workdir)))
  for process in processes:
    process.kill()
  statuses(processes)
  assert statuses(start('finished', prepare=None)) == [0, 0]
  assert whole_runs.read_result(workdir) == whole_runs.read_result(uninterrupted)
  lines = whole_runs.read_history(workdir)
  numbers = [line['step'] for line in lines]
  assert numbers == sorted(set(numbers))
  assert lines[-1]['policy'] == whole_runs.read_history(uninterrupted)[-1]['policy']


def test_python_gives_on_two_processes_what_it_gives_on_one(tmp_path):
  port, processes = whole_runs.free_port(), []
  for process in range(2):
    processes.append(
      whole_runs.CONTEXT.Process(
        target=child_functions.call_python_together,
        args=(tmp_path, port, 2, process),
        name=str(tmp_path / f'log{process}'),
      )
    )
    processes[-1].start()
  one = child_functions.call_python(tmp_path / 'one')
  statuses = list(map(whole_runs.finish, processes))
  assert statuses == [0, 0], (tmp_path / 'log0').read_text()
  first, second = (json.loads((tmp_path / f'{i}.json').read_text()) for i in range(2))
  assert first == second
  expected = (
    'train_batches: not the same in all 2 processes',
    'config and arguments: not the same in all 2 processes',
    'workdir=None in 2 processes: expected a folder that all of them see',
  )
  for line, words in zip(first.pop('errors'), expected, strict=True):
    assert line.startswith(words)
  names, numbers = zip(*jax.tree.leaves_with_path(one))
  other_names, other_numbers = zip(*jax.tree.leaves_with_path(first))
  assert names == other_names
  for name, number, other in zip(names, numbers, other_numbers):
    expected = pytest.approx(number, 1e-4) if isinstance(number, float) else number
    assert other == expected, name


@pytest.mark.parametrize(
  'arguments, expected',
  [
    ({'coordinator': 'a:1'}, '--num_processes=N, --process_id=I missing'),
    ({'num_processes': 2, 'process_id': 0}, '--coordinator=HOST:PORT missing'),
    (
      {'coordinator': 'a', 'num_processes': 2, 'process_id': 0},
      '--coordinator=a: expected HOST:PORT',
    ),
    (
      {'coordinator': 'a:1', 'num_processes': 0, 'process_id': 0},
      '--num_processes=0: expected 1 or more',
    ),
    (
      {'coordinator': 'a:1', 'num_processes': 2, 'process_id': 2},
      '--process_id=2: expected one from 0 to 1',
    ),
    ({'detect': True, 'process_id': 0}, 'expected no other flag'),
    ({'detect': True}, 'cannot join the other processes by the cluster'),
  ],
)
def test_flags_that_make_no_sense(arguments, expected):
  with pytest.raises(ConfigError) as error:
    distributed.initialize(**arguments)
  (problem,) = error.value.problems
  assert expected in problem
