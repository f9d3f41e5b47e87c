"""Writes the report of runs, finished or not, as one page that needs no network.

    python -m fliqs_jax.report --workdir=runs/digits

The page is about that run; those of further --workdir are set beside it. It goes into
the first workdir as report.html, or to --out, and its figures as PNG into a folder
beside it. With --baseline the uniform model within the target's cost is trained first,
in a folder in the first workdir, where the same command goes on with it; the page of
that workdir has it from then on. docs/report.md says how to read it.
"""

from absl import flags

from fliqs_jax import command_line

_WORKDIR = flags.DEFINE_multi_string('workdir', None, 'Folder of a run; repeatable.')
_OUT = flags.DEFINE_string('out', None, 'The page to write.')
_BASELINE = flags.DEFINE_bool(
  'baseline', False, "Train the uniform model of the first search's target before."
)


def main(argv):
  """Writes the report of the given workdirs."""
  del argv
  if _BASELINE.value:
    from fliqs_jax.runs import baseline, loop

    loop.run(*baseline.plan(_WORKDIR.value[0]))
  # After the flags, whose errors need no matplotlib.
  from fliqs_jax.reporting import page

  print(f'Report: {page.write_report(_WORKDIR.value, _OUT.value)}')


if __name__ == '__main__':
  command_line.run(main, required=('workdir',))
