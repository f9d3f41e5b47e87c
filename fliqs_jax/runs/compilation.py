"""The cache of compiled programs, which all runs of a user share."""

import jax
from jax.experimental.compilation_cache import compilation_cache

from fliqs_jax.runs import files


def keep_programs(folder: str) -> None:
  """Keeps the programs that this process compiles from here on in a folder.

  Does nothing where the folder is empty, or the process has a cache already, as by
  JAX_COMPILATION_CACHE_DIR.
  """
  if not folder or jax.config.jax_compilation_cache_dir:
    return
  jax.config.update('jax_compilation_cache_dir', str(files.to_path(folder)))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.1)
  # A program that was compiled before has settled that there is no cache.
  compilation_cache.reset_cache()
