"""Progress of a run: a bar on a terminal, plain lines elsewhere."""

from collections.abc import Mapping
import sys
import time

from rich import progress
from rich.console import Console

from fliqs_jax.runs import quality

# Numbers of a history line that are shown, with their labels.
_SHOWN = {
  'loss': ('loss', '{:.3f}'),
  'accuracy': ('accuracy', '{:.1%}'),
  'bits_per_byte': ('bits per byte', '{:.3f}'),
  'quality': ('quality', '{:.4g}'),
  'cost_ratio': ('cost/target', '{:.3f}'),
  'entropy': ('entropy', '{:.3f}'),
}


class Progress:
  """A progress bar on a terminal, plain lines elsewhere. A context manager."""

  def __init__(self, start: int, num_steps: int):
    self._num_steps = num_steps
    # Notebooks ask for colours, but what they save of a bar is each of its states.
    self._console = Console(stderr=True, force_terminal=sys.stderr.isatty())
    # The first step and when it ended: it compiles, which no other does.
    self._first, self._began = None, 0.0
    self._bar = progress.Progress(
      progress.TextColumn('step {task.completed}/{task.total}'),
      progress.BarColumn(bar_width=20),
      progress.TimeRemainingColumn(compact=True),
      progress.TextColumn('{task.fields[numbers]}'),
      console=self._console,
      disable=not self._console.is_terminal,
    )
    self._task = self._bar.add_task(
      'train', total=num_steps, completed=start, numbers='compiling'
    )

  def __enter__(self) -> 'Progress':
    self._bar.__enter__()
    return self

  def __exit__(self, *error) -> None:
    self._bar.__exit__(*error)

  def begin(self, step: int) -> None:
    """Starts the clock, once the first step has been taken."""
    self._first, self._began = step, time.monotonic()
    self._bar.update(self._task, completed=step, numbers='')

  def update(self, step: int, row: Mapping[str, float]) -> None:
    """Shows the numbers of a history line."""
    hidden = {'accuracy', 'bits_per_byte', 'quality'} - {quality.find_name(row)}
    numbers = '  '.join(
      f'{label} {form.format(row[key])}'
      for key, (label, form) in _SHOWN.items()
      if key in row and key not in hidden
    )
    if self._console.is_terminal:
      self._bar.update(self._task, completed=step, numbers=numbers)
    else:
      elapsed, taken = time.monotonic() - self._began, step - self._first
      left = elapsed / taken * (self._num_steps - step) if taken else None
      eta = '' if left is None else f'  ETA {left:.0f} s'
      # Not logged: a program that calls `fliqs_jax.search` need not set up logging.
      now, place = time.strftime('%H:%M:%S'), f'step {step}/{self._num_steps}'
      print(f'{now} {place}  {numbers}{eta}', file=sys.stderr, flush=True)
