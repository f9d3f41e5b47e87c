"""The config flag of all commands, and errors in one line with status 2."""

from collections.abc import Callable, Sequence
import functools
import io
import logging
import os
import sys
import threading

from absl import app, flags
from absl import logging as absl_logging
import jax
import ml_collections
from ml_collections import config_flags

from fliqs_jax.errors import ConfigError, Preempted, RunError, not_among
from fliqs_jax.runs import again, files
from fliqs_jax.runs.jax_settings import usual_settings
from fliqs_jax.runs.workdir import CONFIG_FILE

# Flags that are defined here belong to the command, whose --help lists them.
flags.disclaim_key_flags()

_USER_ERROR_STATUS = 2
_PREEMPTED_STATUS = 75  # EX_TEMPFAIL of sysexits.h: start me again
_INTERRUPTED_STATUS = 130  # 128 + SIGINT, as shells have it


@functools.cache
def define_config_flag() -> flags.FlagHolder:
  """Defines --config, a file with `get_config`, whose fields --config.x overrides."""
  return config_flags.DEFINE_config_file(
    'config',
    None,
    'Config file, with its variant, configs/resnet18.py:digits; or the folder of a '
    'run, to do it again.',
  )


def run(main: Callable[[Sequence[str]], None], required: Sequence[str]) -> None:
  """Runs a command's `main`; a user's mistake ends with a line and status 2.

  Args:
    main: takes the arguments that are no flags.
    required: names of the flags that must be given.
  """

  def guarded(argv):
    for stream in (sys.stdout, sys.stderr):
      if isinstance(stream, io.TextIOWrapper):
        # Tables have signs that not every locale can write.
        stream.reconfigure(errors='replace')
    _log_to_stderr()
    try:
      with usual_settings():
        main(argv)
    except ConfigError as error:
      _fail(error.problems)
    except FloatingPointError as error:
      _fail([str(error)], status=1)
    except RunError as error:
      _fail([str(error)], status=1, alone=True)
    except Preempted as error:
      _fail([str(error)], status=_PREEMPTED_STATUS)
    except KeyboardInterrupt:
      _fail(['stopped by Ctrl-C'], status=_INTERRUPTED_STATUS, alone=True)
    except jax.errors.JaxRuntimeError as error:
      if 'RESOURCE_EXHAUSTED' not in str(error):
        raise
      reason = str(error).splitlines()[0].rpartition('RESOURCE_EXHAUSTED: ')[2]
      advice = 'a smaller model.width, batch_size or input.image_shape takes less'
      _fail([f'{reason} {advice}'], status=1, alone=True)

  app.run(guarded, flags_parser=lambda argv: _parse(argv, required))


def _log_to_stderr():
  """Shows this package's own lines; what fails in a library comes up as an error."""
  # Before TensorFlow is imported.
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
  os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '0')
  absl_logging.set_verbosity(absl_logging.FATAL)
  # What stops a thread that writes a checkpoint is raised again where it is waited for.
  # The callbacks of its other files then find the thread's event loop closed.
  threading.excepthook = sys.unraisablehook = lambda _: None
  handler = logging.StreamHandler()
  handler.setFormatter(logging.Formatter('%(asctime)s %(message)s', '%H:%M:%S'))
  logger = logging.getLogger('fliqs_jax')
  logger.addHandler(handler)
  logger.setLevel(logging.INFO)
  logger.propagate = False


def _parse(argv, required):
  argv = with_run_folders(argv)
  try:
    rest = flags.FLAGS(argv)
    for name in required:
      if flags.FLAGS[name].value is None:
        raise ConfigError(f'--{name} is missing: expected --{name}={name.upper()}')
    for name in flags.FLAGS:
      # As scripts give it whose variable is not set: an empty path would be the current
      # folder. Fields of the config may be empty.
      given = flags.FLAGS[name].present and not name.startswith('config.')
      if given and flags.FLAGS[name].value in ('', [], ['']):
        raise ConfigError(f'--{name} is empty: expected --{name}={name.upper()}')
    if 'config' in flags.FLAGS and flags.FLAGS['config'].present:
      # An error in the config file is kept back until a field is read.
      _ = flags.FLAGS.config.mode
    if rest[1:]:
      raise ConfigError(f'unexpected argument {rest[1]!r}: expected flags alone')
    return rest
  except SystemExit:  # absl has printed the help, and calls that a failure
    sys.exit(0)
  except Exception as error:  # a config file is code and raises what it likes
    _fail([_missing_file(argv) or _unknown_field(argv) or _one_line(error)])


def with_run_folders(argv: Sequence[str]) -> list[str]:
  """Returns arguments whose --config is a file, also where it was a run's folder."""
  given = list(argv)
  for index, argument in enumerate(given):
    folder = argument.removeprefix('--config=')
    if folder in ('', argument) or folder.partition(':')[0].endswith('.py'):
      continue
    if (files.to_path(folder) / CONFIG_FILE).exists():
      given[index] = f'--config={again.__file__}:{folder}'
  return given


def _missing_file(argv):
  for argument in argv:
    path = argument.removeprefix('--config=').partition(':')[0]
    if not argument.startswith('--config=') or os.path.isfile(path):
      continue
    if not path:
      return '--config is empty: expected --config=configs/resnet18.py:digits'
    if os.path.isdir(path):
      return f'config {path!r} is a folder that holds no run: expected one, or a file'
    return f'config file {path!r} does not exist'


def _unknown_field(argv):
  """Names the first field given that the config lacks, and the nearest one it has."""
  loaded = flags.FlagValues()
  alone = argv[:1] + [a for a in argv if a.startswith('--config=')]
  config_flags.DEFINE_config_file('config', flag_values=loaded, sys_argv=alone)
  try:
    loaded(alone)
    fields = list(_fields(loaded.config))
  except Exception:  # the file itself is at fault, which is reported otherwise
    return None
  for argument in argv:
    name = argument.removeprefix('--config.').partition('=')[0]
    if argument.startswith('--config.') and name not in fields:
      given, expected = f'unknown config field {name!r}', 'a field of the config'
      return not_among(given, name, fields, expected)


def _fields(config, prefix=''):
  for key in config:
    value = config.get_ref(key).get()
    if isinstance(value, ml_collections.ConfigDict):
      yield from _fields(value, f'{prefix}{key}.')
    else:
      yield prefix + key


def _one_line(error):
  """The last line of a message that may carry a traceback, the first of others."""
  lines = [line.strip() for line in str(error).splitlines() if line.strip()]
  if not lines:
    return type(error).__name__
  line = lines[-1] if 'Traceback' in str(error) else lines[0]
  for kind in (f'{ConfigError.__module__}.ConfigError', 'ValueError'):
    line = line.removeprefix(f'{kind}: ')
  return line


def _fail(problems, status=_USER_ERROR_STATUS, alone=False):
  for problem in problems:
    print(f'error: {problem}', file=sys.stderr)
  if alone:
    # Leaving would wait: for other processes, which wait for this one in a collective,
    # and for threads of a failed checkpoint, whose files TensorStore says no more of.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
  sys.exit(status)
