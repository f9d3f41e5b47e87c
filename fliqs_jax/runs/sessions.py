"""Date, duration and device of a run's training: a line for each start.

It is no part of the result, which two equal runs have alike.
"""

import json
import time
from typing import NamedTuple

from etils import epath
import jax

SESSIONS_FILE = 'sessions.jsonl'


class Session(NamedTuple):
  """The time from one start of a run to its end, or to its last word."""

  date: str  # of the start, 2026-11-27T04:22:05Z
  seconds: float
  first_step: int  # that it went on from
  steps: int  # that it took
  device: str  # the kind, as JAX calls it
  num_devices: int  # of all processes


class Recorder:
  """Writes the line of a session that has begun, anew whenever it went on."""

  def __init__(self, workdir: epath.Path, first_step: int):
    self._path, self._began = workdir / SESSIONS_FILE, time.monotonic()
    self._before = self._path.read_text() if self._path.exists() else ''
    self._session = Session(
      date=time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime()),
      seconds=0.0,
      first_step=first_step,
      steps=0,
      device=jax.devices()[0].device_kind,
      num_devices=jax.device_count(),
    )
    self.update(first_step)

  def update(self, step: int) -> None:
    """Writes that the session lasts still, after a step."""
    self._session = self._session._replace(
      seconds=round(time.monotonic() - self._began, 1),
      steps=step - self._session.first_step,
    )
    temporary = self._path.parent / f'.{SESSIONS_FILE}.tmp'
    temporary.write_text(self._before + json.dumps(self._session._asdict()) + '\n')
    temporary.replace(self._path)


def read_sessions(workdir: epath.Path) -> list[Session]:
  """Returns the sessions of a run; none of a run of a version that recorded none.

  A line that cannot be read is left out: nothing but a remark depends on it.
  """
  path = workdir / SESSIONS_FILE
  try:
    lines = path.read_text().splitlines()
  except (OSError, UnicodeDecodeError):
    return []
  return [session for line in lines if (session := _parse(line))]


def _parse(line):
  try:
    session = Session(**json.loads(line))
    numbers = session.seconds, session.first_step, session.steps, session.num_devices
    texts = session.date, session.device
  except (ValueError, TypeError, RecursionError):
    return None
  usable = all(isinstance(number, int | float) for number in numbers)
  return session if usable and all(isinstance(text, str) for text in texts) else None
