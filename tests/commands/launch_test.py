"""The launchers, against a small cloud in the place of the real one.

Stand-ins for gcloud, kubectl, docker, srun and python come first on PATH and record
their calls. That of gcloud keeps the state of one slice, and runs what it is given for
the workers, each with a home of its own.
"""

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

ROOT = pathlib.Path(__file__).parents[2]
LAUNCH = ROOT / 'launch'
AWKWARD = """--config.search.groups=("it's a \\"b\\" $HOME & (c)$",)"""
MAIN_FLAGS = ('--config=configs/resnet18.py', '--workdir=gs://b/run', AWKWARD)
SLICE = ('--name=job', '--zone=zone-a')
RUN = ('run', *SLICE, '--accelerator=v5litepod-8', '--poll=0')

RECORD = r"""#!/usr/bin/env bash
{ flock 9; printf '%s\x1f' "${0##*/}" "$@"; printf '\x1e'; } 9>>"$CLOUD/calls" >&9
"""

# Fates of main, one for each start: an exit status, or what happens to the slice.
GCLOUD = r"""
cd "$CLOUD"
case "$1 $2 $3 $4" in
  *describe)
    [[ -e state ]] || { echo 'ERROR: NOT_FOUND: no such resource' >&2; exit 1; }
    cat state
    [[ $(<state) != WAITING_FOR_RESOURCES ]] || echo ACTIVE >state ;;
  *create) echo WAITING_FOR_RESOURCES >state ;;
  *delete) rm state ;;
  *scp) for worker in 0 1; do mkdir -p home$worker && cp "$5" home$worker/; done
        mv home0/fliqs_jax-job.tar.gz home0/fliqs_jax.tar.gz
        mv home1/fliqs_jax-job.tar.gz home1/fliqs_jax.tar.gz ;;
  *ssh)
    for argument in "$@"; do
      case $argument in
        --worker=all) workers='0 1' ;;
        --worker=*) workers=${argument#*=} ;;
        --command=*) command=${argument#*=} ;;
      esac
    done
    for worker in $workers; do
      [[ $(<state) == ACTIVE ]] || exit 255
      HOME=$CLOUD/home$worker bash -c "$command" || exit
    done ;;
esac
"""

# The installer, whose environment has a python that meets the next fate.
UV = r"""
[[ $1 != venv ]] || { mkdir -p venv/bin && cp "$CLOUD/bin/meet_fate" venv/bin/python; }
"""
MEET_FATE = r"""
count=$(cat "$HOME/count" 2>/dev/null || echo 0)
echo $((count + 1)) >"$HOME/count"
fates=($(<"$CLOUD/fates"))
echo "step 100 of start $count"
case ${fates[$count]} in
  preempted) echo SUSPENDED >"$CLOUD/state"; exit 1 ;;
  waits) until [[ -e $CLOUD/go ]]; do sleep 0.05; done ;;
  *) exit "${fates[$count]}" ;;
esac
"""
KUBECTL = r"""
case "$1 $2" in
  'get jobset')
    read -r reply <"$CLOUD/replies"
    sed -i 1d "$CLOUD/replies"
    [[ $reply == ABSENT ]] || echo "$reply" ;;
  'apply -f') cat >"$CLOUD/manifest.yaml" ;;
  'logs --follow') echo 'step 100' ;;
esac
"""
# Of one process among several.
PYTHON = r"""
echo "$@"
for argument in "$@"; do
  case $argument in --process_id=*) id=${argument#*=} ;; esac
done
fates=($(<"$CLOUD/fates"))
until [[ $(tr -cd '\036' <"$CLOUD/calls") == $'\x1e\x1e\x1e' ]]; do sleep 0.05; done
[[ ${fates[$id]} != hang ]] || exec sleep 60
exit "${fates[$id]}"
"""


class Cloud:
  """The stand-ins, what they were called with, and how to run a launcher with them."""

  def __init__(self, folder):
    self.folder = folder
    self.bin = folder / 'bin'
    self.bin.mkdir()
    for name, text in {
      'gcloud': GCLOUD,
      'uv': UV,
      'meet_fate': MEET_FATE,
      'kubectl': KUBECTL,
      'docker': '',
      'srun': 'exit "$(<"$CLOUD/fates")"',
      'scontrol': '',
      'python': PYTHON,
    }.items():
      path = self.bin / name
      path.write_text(RECORD + text)
      path.chmod(0o755)
    self.environment = {
      **os.environ,
      'PATH': f'{self.bin}:{os.environ["PATH"]}',
      'CLOUD': str(folder),
      'TMPDIR': str(folder),
      'SLURM_JOB_ID': '7',
    }

  def write(self, name, *lines):
    (self.folder / name).write_text('\n'.join(lines) + '\n')

  def start(self, script, *arguments, **kwargs):
    # A job in the background ignores SIGINT, and so would the script that it starts.
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
      ['bash', str(LAUNCH / script), *arguments],
      env=self.environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      **kwargs,
    )
    signal.signal(signal.SIGINT, previous)
    return process

  def run(self, script, *arguments):
    """Returns (status, stdout, stderr)."""
    process = self.start(script, *arguments)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err

  def calls(self, *programs):
    """Returns the calls of these programs, each a list of words."""
    if not (self.folder / 'calls').exists():
      return []
    calls = (self.folder / 'calls').read_text().split('\x1e')[:-1]
    calls = [call.split('\x1f')[:-1] for call in calls]
    return [call for call in calls if call[0] in programs]

  def tpu_calls(self):
    """Returns the calls of gcloud but those of the workers."""
    return [call for call in self.calls('gcloud') if call[1] == 'compute']

  def verbs(self):
    return [call[4] for call in self.tpu_calls()]


@pytest.fixture
def cloud(tmp_path):
  return Cloud(tmp_path)


def read_words(text):
  """Returns the words of each line of a shell's text."""
  script = (
    'while IFS= read -r line; do eval "printf \'%s\\x1f\' $line"; printf "\\x1e"; done'
  )
  text = subprocess.run(
    ['bash', '-c', script], input=text, capture_output=True, text=True, check=True
  ).stdout
  return [line.split('\x1f')[:-1] for line in text.split('\x1e')[:-1]]


def test_slice_is_recreated_and_restarted_until_done(cloud):
  cloud.write('fates', 'preempted', '75', '0')
  status, out, err = cloud.run('tpu_vm.sh', *RUN, '--spot', '--', *MAIN_FLAGS)
  assert status == 0, err
  assert 'step 100 of start 2' in out
  assert 'done: gs://b/run' in err
  life = [verb for verb in cloud.verbs() if verb in ('create', 'delete')]
  assert life == ['create', 'delete', 'create', 'delete']
  assert not (cloud.folder / 'state').exists()
  create = next(call for call in cloud.tpu_calls() if call[4] == 'create')
  assert {'--accelerator-type=v5litepod-8', '--runtime-version=v2-alpha-tpuv5-lite',
          '--spot', '--node-id=job', '--zone=zone-a'} <= set(create)  # fmt: skip
  # Three starts on two workers, all with main's flags as they were given.
  starts = cloud.calls('python')
  assert len(starts) == 6
  for start in starts:
    assert start[1:] == ['-m', 'fliqs_jax.main', '--distributed', *MAIN_FLAGS]
  # The package is all there on a worker.
  worker = cloud.folder / 'home1' / 'fliqs_jax'
  assert (worker / 'fliqs_jax' / 'main.py').exists()
  assert (worker / 'configs' / 'resnet18.py').exists()
  logs = [call for call in cloud.calls('gcloud') if call[1] == 'storage']
  assert len(logs) == 6 and all(c[4].startswith('gs://b/run/logs/') for c in logs)


@pytest.mark.parametrize('fates, message', [
    (('1',), 'main failed on a worker and is not restarted; logs: gs://b/run/logs'),
    (('75', '75'), 'giving up after 1 restarts; logs: gs://b/run/logs'),
])  # fmt: skip
def test_failing_run_ends_without_a_slice(cloud, fates, message):
  cloud.write('fates', *fates)
  status, _, err = cloud.run('tpu_vm.sh', *RUN, '--max_restarts=1', '--', *MAIN_FLAGS)
  assert status == 1
  assert message in err
  assert len(cloud.calls('python')) == 2 * len(fates)
  assert cloud.verbs().count('create') == cloud.verbs().count('delete') == 1


def test_dry_run_prints_the_calls_and_makes_none(cloud):
  cloud.write('fates', '0')
  status, out, err = cloud.run('tpu_vm.sh', *RUN, '--dry_run', '--', *MAIN_FLAGS)
  assert status == 0, err
  assert cloud.calls('gcloud') == []
  printed = [words for words in read_words(out) if words[0] == 'gcloud']
  cloud.run('tpu_vm.sh', *RUN, '--', *MAIN_FLAGS)
  recorded = cloud.tpu_calls()
  # A wait for the slice is all that a run adds.
  assert [call[4] for call in recorded[:3]] == ['describe', 'create', 'describe']
  del recorded[2]
  assert printed == recorded


def wait_until(condition):
  deadline = time.monotonic() + 60
  while not condition():
    assert time.monotonic() < deadline
    time.sleep(0.05)


def test_interrupted_run_says_what_remains_and_is_taken_over(cloud):
  cloud.write('fates', 'waits')
  process = cloud.start('tpu_vm.sh', *RUN, '--', *MAIN_FLAGS, start_new_session=True)
  wait_until(lambda: cloud.verbs().count('ssh') == 2)  # it started, and follows
  os.killpg(process.pid, signal.SIGINT)
  _, err = process.communicate(timeout=60)
  assert process.returncode == 130
  assert 'cost money' in err
  assert 'launch/tpu_vm.sh stop --name=job --zone=zone-a' in err
  assert 'delete' not in cloud.verbs()
  process = cloud.start('tpu_vm.sh', *RUN, '--', *MAIN_FLAGS)
  wait_until(lambda: cloud.verbs().count('ssh') == 4)
  cloud.write('go')
  _, err = process.communicate(timeout=60)
  assert process.returncode == 0, err
  assert cloud.verbs().count('create') == cloud.verbs().count('delete') == 1
  assert len(cloud.calls('python')) == 2  # one for each worker: nothing started twice


def test_status_logs_stop(cloud):
  assert cloud.run('tpu_vm.sh', 'status', *SLICE)[:2] == (0, 'job: ABSENT\n')
  assert cloud.run('tpu_vm.sh', 'stop', *SLICE)[:2] == (0, 'job: nothing to stop\n')
  status, _, err = cloud.run('tpu_vm.sh', 'logs', *SLICE)
  assert status == 1 and 'job is ABSENT' in err
  cloud.write('state', 'ACTIVE')
  (cloud.folder / 'home0').mkdir()
  (cloud.folder / 'home0' / 'fliqs_jax.log').write_text('step 100\n')
  assert cloud.run('tpu_vm.sh', 'status', *SLICE)[1] == 'job: ACTIVE\n'
  assert 'step 100' in cloud.run('tpu_vm.sh', 'logs', *SLICE)[1]
  assert cloud.run('tpu_vm.sh', 'stop', *SLICE)[:2] == (0, 'job: deleted\n')
  assert cloud.verbs().count('delete') == 1


def test_state_that_cannot_be_told_is_not_absence(cloud):
  (cloud.bin / 'gcloud').write_text(RECORD + 'echo "ERROR: log in first" >&2; exit 1')
  status, out, err = cloud.run('tpu_vm.sh', 'stop', *SLICE, '--poll=0')
  assert status == 1 and out == ''
  assert 'cannot tell the state of job: ERROR: log in first' in err


@pytest.mark.parametrize('script, arguments, message', [
    ('tpu_vm.sh', ('fly',), "'fly' is no command"),
    ('tpu_vm.sh', ('run', *SLICE), '--accelerator=… is missing'),
    ('tpu_vm.sh', (*RUN, '--sport'), 'unknown flag --sport'),
    ('tpu_vm.sh', (*RUN, '--name=My_Job', '--', *MAIN_FLAGS), "--name='My_Job'"),
    ('tpu_vm.sh', (*RUN, '--accelerator=v9-8', '--', *MAIN_FLAGS), "'v9-8'"),
    ('tpu_vm.sh', (*RUN, '--', '--workdir=gs://b/run'), '--config=…'),
    ('tpu_vm.sh', (*RUN, '--', '--config=c', '--workdir=runs/a'), 'gs://'),
    ('gke.sh', ('run', '--name=a', '--image=i', '--topology=16', '--chips_per_node=4'),
     "--topology='16'"),
    ('gke.sh', ('run', '--name=a', '--image=i', '--topology=2x4', '--chips_per_node=3'),
     'does not divide the 8 of 2x4'),
    ('slurm.sbatch', ('--config=c',), '--workdir=…'),
    ('local_processes.sh', ('two',), "'two' is no number of processes"),
    ('local_processes.sh', ('2', '--', '--config=c'), '--workdir=…'),
])  # fmt: skip
def test_wrong_input_is_one_line_and_creates_nothing(cloud, script, arguments, message):
  status, out, err = cloud.run(script, *arguments)
  assert (status, out) == (2, '')
  assert message in err and err.count('\n') == 1
  assert not (cloud.folder / 'calls').exists()


@pytest.mark.parametrize(
  'script', ['tpu_vm.sh', 'gke.sh', 'slurm.sbatch', 'local_processes.sh']
)
def test_help(cloud, script):
  status, out, _ = cloud.run(script, '--help')
  assert status == 0
  assert script in out and '--dry_run' in out and '#' not in out


GKE_RUN = (
  'run', '--name=job', '--image=registry/image:1', '--topology=4x4',
  '--chips_per_node=4', '--max_restarts=3', '--poll=0',
)  # fmt: skip


def test_jobset_runs_until_completed(cloud):
  cloud.write('replies', 'ABSENT', 'job/', 'job/', 'job/Completed')
  status, out, err = cloud.run('gke.sh', *GKE_RUN, '--', *MAIN_FLAGS)
  assert status == 0, err
  assert 'step 100' in out
  assert [call[1] for call in cloud.calls('docker')] == ['build', 'push']
  assert cloud.calls('kubectl')[-1][1] == 'delete'

  jobset = yaml.safe_load((cloud.folder / 'manifest.yaml').read_text())
  assert jobset['kind'] == 'JobSet' and jobset['metadata']['name'] == 'job'
  job = jobset['spec']['replicatedJobs'][0]['template']['spec']
  assert job['parallelism'] == job['completions'] == 4  # 16 chips, 4 a node
  (container,) = job['template']['spec']['containers']
  assert container['image'] == 'registry/image:1'
  assert container['resources']['limits'] == {'google.com/tpu': 4}
  # Kubernetes reads $$ as $.
  flags = [word.replace('$$', '$') for word in container['args']]
  assert flags == ['--distributed', *MAIN_FLAGS]


def test_jobset_restarts_as_main_asks(cloud):
  """Applies the policies, as Kubernetes documents them, to how a worker may end."""
  _, out, _ = cloud.run('gke.sh', *GKE_RUN, '--dry_run', '--', *MAIN_FLAGS)
  text = out[out.index('apiVersion') : out.index('kubectl get', out.index('kind'))]
  spec = yaml.safe_load(text)['spec']
  job = spec['replicatedJobs'][0]['template']['spec']
  assert job['template']['spec']['restartPolicy'] == 'Never'  # podFailurePolicy's need
  assert job['backoffLimit'] == 0

  def restarts(exit_status, disrupted=False):
    for rule in job['podFailurePolicy']['rules']:
      if 'onPodConditions' in rule:
        matches = disrupted and rule['onPodConditions'] == [
          {'type': 'DisruptionTarget'}
        ]
      else:
        matches = exit_status not in rule['onExitCodes']['values']
        assert rule['onExitCodes']['operator'] == 'NotIn'
      if matches:
        reason = {'Count': 'BackoffLimitExceeded', 'FailJob': 'PodFailurePolicy'}[
          rule['action']
        ]
        break
    else:
      reason = 'BackoffLimitExceeded'
    (rule,) = spec['failurePolicy']['rules']
    assert rule['action'] == 'FailJobSet'
    return reason not in rule['onJobFailureReasons']

  assert spec['failurePolicy']['maxRestarts'] == 3
  assert restarts(75) and restarts(137, disrupted=True)
  assert not restarts(1) and not restarts(2) and not restarts(137)


def test_jobset_that_failed_is_kept_for_its_logs(cloud):
  cloud.write('replies', 'ABSENT', 'job/', 'job/Failed')
  status, _, err = cloud.run('gke.sh', *GKE_RUN, '--', *MAIN_FLAGS)
  assert status == 1
  assert 'launch/gke.sh logs --name=job' in err
  assert 'delete' not in [call[1] for call in cloud.calls('kubectl')]


def test_jobset_dry_run_and_stop(cloud):
  _, out, _ = cloud.run('gke.sh', *GKE_RUN, '--dry_run', '--', *MAIN_FLAGS)
  assert not (cloud.folder / 'calls').exists()
  lines = out.splitlines(keepends=True)
  printed = read_words(''.join(x for x in lines if x.startswith(('kubectl', 'docker'))))
  cloud.write('replies', 'ABSENT', 'job/Completed', 'ABSENT', 'job/')
  cloud.run('gke.sh', *GKE_RUN, '--', *MAIN_FLAGS)
  assert printed == cloud.calls('kubectl', 'docker')
  assert cloud.run('gke.sh', 'stop', '--name=job')[:2] == (0, 'job: nothing to stop\n')
  assert cloud.run('gke.sh', 'stop', '--name=job')[1] == 'job: deleted\n'


@pytest.mark.parametrize('fate, requeued', [('0', False), ('1', False), ('75', True)])
def test_slurm_queues_again_what_asks_for_it(cloud, fate, requeued):
  cloud.write('fates', fate)
  status, out, _ = cloud.run('slurm.sbatch', *MAIN_FLAGS)
  assert status == int(fate)
  (srun,) = cloud.calls('srun')
  assert srun[2:] == ['python', '-m', 'fliqs_jax.main', '--distributed', *MAIN_FLAGS]
  assert cloud.calls('scontrol') == [['scontrol', 'requeue', '7']] * requeued
  _, out, _ = cloud.run('slurm.sbatch', '--dry_run', *MAIN_FLAGS)
  assert read_words(out) == [srun]


@pytest.mark.parametrize('fates, expected', [
    (('0', '0', '0'), 0),
    (('75', '75', '75'), 75),
    (('hang', '3', 'hang'), 3),  # the others are stopped
])  # fmt: skip
def test_local_processes(cloud, fates, expected):
  cloud.write('fates', *fates)
  arguments = ('3', '--port=1234', '--', *MAIN_FLAGS)
  status, out, err = cloud.run('local_processes.sh', *arguments)
  assert status == expected, err
  calls = sorted(cloud.calls('python'))
  assert calls == [
    ['python', '-m', 'fliqs_jax.main', '--coordinator=localhost:1234',
     '--num_processes=3', f'--process_id={i}', *MAIN_FLAGS]
    for i in range(3)
  ]  # fmt: skip
  assert [i for i in range(3) if f'[{i}] -m fliqs_jax.main' in out] == [0, 1, 2]
  _, out, _ = cloud.run('local_processes.sh', '3', '--dry_run', *arguments[1:])
  assert read_words(out) == calls


def test_shellcheck():
  folder = pathlib.Path(sys.executable).parent
  program = shutil.which('shellcheck', path=f'{folder}:{os.environ["PATH"]}')
  assert program, "pip install -e '.[test]' brings shellcheck"
  scripts = [
    str(path) for path in LAUNCH.iterdir() if path.suffix in ('.sh', '.sbatch')
  ]
  assert len(scripts) == 5
  done = subprocess.run(
    [program, '-x', *scripts], cwd=ROOT, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stdout
