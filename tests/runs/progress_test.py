"""What a run shows of its progress where there is no terminal."""

from fliqs_jax.runs import progress


def test_the_time_left_is_that_of_steps_after_the_first(capsys, monkeypatch):
  now = [0.0]
  monkeypatch.setattr(progress.time, 'monotonic', lambda: now[0])
  with progress.Progress(start=10, num_steps=110) as shown:
    now[0] = 60.0  # what the first step took, which compiles
    shown.begin(11)
    shown.update(11, {'loss': 2.0})
    now[0] = 65.0
    shown.update(21, {'loss': 1.0})
  first, second = capsys.readouterr().err.splitlines()
  assert first.endswith('step 11/110  loss 2.000')
  # Ten steps took five seconds; 89 are left.
  assert second.endswith('step 21/110  loss 1.000  ETA 44 s')


def test_a_quality_is_shown_as_what_it_is(capsys):
  with progress.Progress(start=0, num_steps=9) as shown:
    shown.begin(1)
    shown.update(1, {'loss': 2.0, 'accuracy': 90.0, 'quality': -1.5})
    shown.update(1, {'loss': 2.0, 'accuracy': 0.9, 'quality': -1.5})
  own, fraction = capsys.readouterr().err.splitlines()
  assert own.endswith('  loss 2.000  quality -1.5')
  assert fraction.endswith('  loss 2.000  accuracy 90.0%')
