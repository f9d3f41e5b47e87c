"""Folders of runs: who holds them, and histories in them and in object stores."""

import contextlib
import json
import pathlib
import re
import resource
import socket
import sys

import child_functions
from clu import metric_writers
from etils import epath
import jax
import pytest
import whole_runs

from fliqs_jax.errors import ConfigError, RunError
from fliqs_jax.layers.layer import Layer, to_json
from fliqs_jax.runs import files, sessions
from fliqs_jax.runs import workdir as workdirs
from fliqs_jax.runs.result import read_result


def test_a_workdir_in_use_is_refused_until_its_holder_ends_or_dies(tmp_path):
  here, there = whole_runs.CONTEXT.Pipe()
  workdir = tmp_path / 'run'
  holder = whole_runs.CONTEXT.Process(
    target=child_functions.hold, args=(workdir, there)
  )
  holder.start()
  there.close()  # so that a holder that dies ends the wait for it
  pid = here.recv()
  refusal = f'in use by process {pid} on {socket.gethostname()}'
  with pytest.raises(ConfigError, match=refusal), workdirs.lock(epath.Path(workdir)):
    pass
  holder.kill()
  holder.join()
  for _ in range(2):
    with workdirs.lock(epath.Path(workdir)):
      pass


def test_a_workdir_that_cannot_be_made(tmp_path):
  (tmp_path / 'file').write_text('')
  below = epath.Path(tmp_path) / 'file' / 'run'
  with (
    pytest.raises(ConfigError, match='cannot write to workdir'),
    workdirs.lock(below),
  ):
    pass


@pytest.mark.parametrize('is_there', [False, True])
def test_a_copy_that_fails_leaves_nothing(tmp_path, is_there):
  source, target = epath.Path(tmp_path) / 'run', epath.Path(tmp_path) / 'copy'
  (source / 'checkpoints').mkdir(parents=True)
  (source / 'config.json').write_text('{}')
  (source / 'checkpoints' / 'weights').write_text('a' * 5_000)
  if is_there:
    target.mkdir()
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, limits[1]))
  try:
    problem = files.copy_folder(source, target)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert problem == f'cannot write to {str(target)!r}: File too large'
  assert target.exists() == is_there and not (is_there and any(target.iterdir()))
  assert files.copy_folder(source, target) is None
  assert (target / 'checkpoints' / 'weights').read_text() == 'a' * 5_000
  assert 'expected a new or empty folder' in files.copy_folder(source, target)
  source.rmtree()
  assert "run' is gone" in files.copy_folder(source, target)


def test_layers_are_those_of_the_run_that_a_folder_holds(tmp_path):
  folder = epath.Path(tmp_path)
  first = Layer('first', 'op', 'dense', (1, 4), (4, 3), (1, 3), 12, 15)
  workdirs.check_layers([first], folder)  # no run yet
  workdirs.write(folder, workdirs.LAYERS_FILE, to_json([first]))
  workdirs.check_layers([first], folder)
  second = first._replace(path='second')
  wider = first._replace(kernel_shape=(4, 5))
  for layers, name in (([first, second], 'second'), ([wider], 'first'), ([], 'first')):
    with pytest.raises(ConfigError, match=f'another network: layer {name!r}'):
      workdirs.check_layers(layers, folder)


def test_configs_of_earlier_versions_list_the_layers_of_own_networks(tmp_path):
  model = {'name': 'Sequence', 'width': 1.0}
  old = {'mode': 'search', 'dataset': 'own batches'}
  old['model'] = model | {'layers': '[]'}
  (tmp_path / workdirs.CONFIG_FILE).write_text(json.dumps(old))
  assert workdirs.read_config(epath.Path(tmp_path)).model.to_dict() == model
  result = {'formats': {'first': 'int4'}, 'config': old}
  (tmp_path / 'result.json').write_text(json.dumps(result))
  assert read_result(tmp_path / 'result.json')['config']['model'] == model


def write_history(workdir, start, steps):
  with workdirs.History(workdir, start) as history:
    for step in steps:
      history.write(step, {'loss': step / 3}, {'layer': {'int4': 1.0}})


def steps_in(workdir):
  lines = (workdir / workdirs.HISTORY_FILE).read_text().splitlines()
  return [json.loads(line)['step'] for line in lines]


class ObjectStore(epath.backend._OsPathBackend):
  """A folder as `gs://`, which like it writes whole objects and never appends."""

  def __init__(self, root):
    self.root = root

  def _local(self, path):
    return str(self.root / str(path).removeprefix('gs://'))

  @contextlib.contextmanager
  def open(self, path, mode):
    if 'a' in mode:
      raise NotImplementedError('objects cannot be appended to')
    with super().open(self._local(path), mode) as file:
      yield file

  def exists(self, path):
    return super().exists(self._local(path))

  def replace(self, path, dst):
    super().replace(self._local(path), self._local(dst))

  def makedirs(self, path, **kwargs):
    super().makedirs(self._local(path), **kwargs)

  def isdir(self, path):
    return super().isdir(self._local(path))


class NoEvents:
  """TensorFlow's writer, which reaches for the network by itself."""

  def __init__(self, folder):
    pass

  write_scalars = flush = close = lambda *_: None


@pytest.fixture(params=['local', 'remote'])
def workdir(request, tmp_path, monkeypatch):
  if request.param == 'local':
    return epath.Path(tmp_path)
  monkeypatch.setattr(metric_writers, 'SummaryWriter', NoEvents)
  (tmp_path / 'bucket' / 'run').mkdir(parents=True)
  store = ObjectStore(tmp_path)
  monkeypatch.setattr(type(epath.Path('gs://a')), '_backend', property(lambda _: store))
  return epath.Path('gs://bucket/run')


def test_history_goes_on_without_gaps_or_doubles(workdir):
  write_history(workdir, 0, [2, 4, 6])
  write_history(workdir, 4, [6, 8])
  assert steps_in(workdir) == [2, 4, 6, 8]


def test_a_line_that_is_cut_off_is_dropped(workdir):
  write_history(workdir, 0, [2, 4])
  path = workdir / workdirs.HISTORY_FILE
  path.write_text(path.read_text()[:-9])
  write_history(workdir, 4, [6])
  assert steps_in(workdir) == [2, 6]


def test_a_remote_workdir_is_locked_without_a_lock_file(workdir):
  with workdirs.lock(workdir):
    content = {'mode': 'search', 'dataset': 'digits', 'model': {'name': 'a'}}
    workdirs.write(workdir, 'config.json', content)
  assert workdirs.read_config(workdir).to_dict() == content


@pytest.mark.parametrize(
  'change',
  [
    {'mode': None}, {'dataset': 5}, {'model': 'resnet18'}, {'model': None},
    {'seed': 'x'}, {'search': 7}, {'search': []}, {'search': {'num_samples': 'x'}},
    {'input': {'image_shape': 5}},
  ],
)  # fmt: skip
def test_a_damaged_config_is_one_line(tmp_path, change):
  folder = epath.Path(tmp_path)
  content = {'mode': 'search', 'dataset': 'digits', 'model': {'name': 'a'}, **change}
  workdirs.write(folder, workdirs.CONFIG_FILE, content)
  with pytest.raises(ConfigError, match='config.json. is damaged: ') as error:
    workdirs.read_config(folder)
  assert len(error.value.problems) == 1


def test_a_workdir_that_is_gone(tmp_path):
  workdir = epath.Path(tmp_path / 'run')
  workdir.mkdir()
  with workdirs.History(workdir, 0) as history:
    history.write(1, {'loss': 1.0}, {})
    workdir.rmtree()
    with pytest.raises(RunError, match='No such file or directory'):
      history.write(2, {'loss': 1.0}, {})
  assert not pathlib.Path(workdir).exists()


def test_without_tensorflow_there_is_a_history_and_no_events(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'tensorflow', None)  # its import fails
  with workdirs.History(epath.Path(tmp_path), 0) as history:
    history.write(3, {'loss': 1.0}, {'conv': {'int4': 1.0}})
  (line,) = workdirs.read_history(epath.Path(tmp_path))
  assert line == {'step': 3, 'loss': 1.0, 'policy': {'conv': {'int4': 1.0}}}
  written = {path.name for path in tmp_path.iterdir()}
  assert written == {workdirs.HISTORY_FILE, sessions.SESSIONS_FILE}


def test_each_start_of_a_run_is_a_session(tmp_path, monkeypatch):
  now = [100.0]
  monkeypatch.setattr(sessions.time, 'monotonic', lambda: now[0])
  folder = epath.Path(tmp_path)
  with workdirs.History(folder, 0) as history:
    now[0] += 20
    history.write(4, {'loss': 1.0}, {})
    # A process that is killed now has written this much.
    (first,) = sessions.read_sessions(folder)
    assert (first.first_step, first.steps, first.seconds) == (0, 4, 20.0)
  with workdirs.History(folder, 3) as history:
    history.write(9, {'loss': 1.0}, {})
    now[0] += 5
    history.write_evaluation(9, {'loss': 1.0})
  before, resumed = sessions.read_sessions(folder)
  assert before == first
  assert (resumed.first_step, resumed.steps, resumed.seconds) == (3, 6, 5.0)
  assert (resumed.device, resumed.num_devices) == ('cpu', jax.device_count())
  assert re.fullmatch(r'\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ', resumed.date)
