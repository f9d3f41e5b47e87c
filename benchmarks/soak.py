"""Memory and speed of a long run: the digits search, watched from outside.

    python benchmarks/soak.py [--minutes=60]

The run has no end within that time, writes a line every 100 steps and a checkpoint
about every minute, is then stopped by SIGTERM, and its checkpoint evaluated. Resident
memory, open files, threads and the processor time of a step, which other work on the
machine hardly changes, are sampled every 5 seconds on Linux. Exit status 1 where, past
a warm-up of 5 minutes (a third of the time, where that is less), the median memory of
the last samples, a twelfth of all, is more than 2 % above that of as many first ones,
the fewest open files or threads of the last third are more than those of the middle
one, or its median step is more than 1.1 times that one's.

Every checkpoint leaves about 0.8 kB an array in the process: TensorStore 0.1.86 and
before it keep the strings of each spec that Orbax converts to JSON. So
`--checkpoint_every=100`, which is every few seconds here, fails by its memory. With
`--arenas` glibc's allocator has so many heaps for the run's threads, as by
MALLOC_ARENA_MAX; without, eight for each core.
"""

import argparse
import json
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

COMMAND = [
    sys.executable, '-m', 'fliqs_jax.main', '--config=configs/resnet18.py:digits',
]  # fmt: skip
ROOT = pathlib.Path(__file__).parents[1]
_INTERVAL = 5  # seconds


class Sample(NamedTuple):
  """A run at one moment."""

  seconds: float  # since the run began
  cpu: float  # seconds that its threads have computed
  rss: int  # bytes
  files: int
  threads: int
  step: int


def sample(pid, workdir, began):
  """Returns the Sample of a process now."""
  status = pathlib.Path(f'/proc/{pid}/status').read_text()
  field = lambda name: int(status.partition(f'{name}:')[2].split()[0])
  # The second field, the name, is in parentheses and may hold spaces.
  times = pathlib.Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()
  history = workdir / 'history.jsonl'
  lines = history.read_text().splitlines() if history.exists() else []
  return Sample(
    seconds=time.monotonic() - began,
    cpu=(int(times[11]) + int(times[12])) / os.sysconf('SC_CLK_TCK'),
    rss=1024 * field('VmRSS'),
    files=len(list(pathlib.Path(f'/proc/{pid}/fd').iterdir())),
    threads=field('Threads'),
    step=json.loads(lines[-1])['step'] if lines else 0,
  )


def step_times(samples):
  """Returns a step's processor seconds between samples in which lines were written."""
  moved = [samples[0]] + [
    new for old, new in zip(samples, samples[1:]) if new.step > old.step
  ]
  return [
    (new.cpu - old.cpu) / (new.step - old.step)
    for old, new in zip(moved, moved[1:])
    if new.step > old.step
  ]


def problems_of(samples):
  """Returns a line for each thing that grew, and prints what it looks at."""
  total = samples[-1].seconds
  warm = [s for s in samples if s.seconds >= min(300, total / 3) and s.step > 0]
  middle = [s for s in warm if s.seconds < 2 * total / 3]
  last = [s for s in warm if s.seconds >= 2 * total / 3]
  problems = []
  share = max(1, len(samples) // 12)
  memory = [
    statistics.median(s.rss for s in part) for part in (warm[:share], warm[-share:])
  ]
  grown = f'{memory[0] / 1e6:.1f} to {memory[1] / 1e6:.1f} MB'
  print(f'memory: {grown} ({memory[1] / memory[0] - 1:+.1%}), medians of a twelfth')
  if memory[1] > 1.02 * memory[0]:
    problems.append(f'memory grew from {grown}')
  for name in ('files', 'threads'):
    # Some come and go with a checkpoint. What leaks stays, so it raises the fewest.
    before, after = (sorted(getattr(s, name) for s in part) for part in (middle, last))
    print(f'{name}: {before[0]} to {before[-1]} in the middle third, {after[0]} to '
          f'{after[-1]} in the last')  # fmt: skip
    if after[0] > before[0]:
      problems.append(f'{name} grew from {before[0]} to {after[0]}')
  before, after = (statistics.median(step_times(part)) for part in (middle, last))
  print(f'step: {before:.4f} s of a processor in the middle third, {after:.4f} s later')
  if after > 1.1 * before:
    problems.append(f'the median step went from {before:.4f} s to {after:.4f} s')
  return problems


def watch(workdir, minutes, checkpoint_every, arenas):
  """Runs the search for so long and returns its samples."""
  environment = os.environ | ({'MALLOC_ARENA_MAX': str(arenas)} if arenas else {})
  process = subprocess.Popen(
      [*COMMAND, f'--workdir={workdir}', '--config.num_steps=100000000',
       f'--config.checkpoint_every={checkpoint_every}', '--config.log_every=100'],
      cwd=ROOT, stderr=subprocess.DEVNULL, env=environment,
  )  # fmt: skip
  samples = []
  try:
    while process.poll() is None and not (workdir / 'history.jsonl').exists():
      time.sleep(_INTERVAL)  # it compiles
    began = time.monotonic()
    while process.poll() is None and time.monotonic() - began < 60 * minutes:
      samples.append(sample(process.pid, workdir, began))
      time.sleep(_INTERVAL)
    process.send_signal(signal.SIGTERM)
    if process.wait() != 75:
      sys.exit(f'the run ended with status {process.returncode}: expected 75')
  finally:
    process.kill()
  return samples


def main():
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--minutes', type=float, default=60)
  parser.add_argument('--checkpoint_every', type=int, default=2_000, help='steps')
  parser.add_argument('--arenas', type=int, help='heaps of the allocator')
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    workdir = pathlib.Path(folder) / 'run'
    samples = watch(workdir, args.minutes, args.checkpoint_every, args.arenas)
    subprocess.run(
        [*COMMAND, f'--workdir={folder}/eval', '--config.mode=eval',
         f'--config.checkpoint={workdir}', '--config.formats=int4'],
        cwd=ROOT, check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
  print(f'{len(samples)} samples, {samples[-1].step} steps')
  if problems := problems_of(samples):
    sys.exit('\n'.join(problems))


if __name__ == '__main__':
  main()
