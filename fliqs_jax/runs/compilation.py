"""The cache of compiled programs, which all runs of a user share."""

import logging

import jax
from jax.experimental.compilation_cache import compilation_cache

from fliqs_jax.runs import files

_logger = logging.getLogger(__name__)


def keep_programs(folder: str) -> None:
  """Keeps the programs that this process compiles from here on in a folder.

  Does nothing where the name is empty or the folder cannot be made, or the process has
  a cache already, as by JAX_COMPILATION_CACHE_DIR.
  """
  if not folder or jax.config.jax_compilation_cache_dir:
    return
  path = files.to_path(folder)
  try:
    path.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    _logger.info('No compiled programs are kept: %s.', error)
    return
  jax.config.update('jax_compilation_cache_dir', str(path))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.1)
  # A program that was compiled before has settled that there is no cache.
  compilation_cache.reset_cache()
