"""JAX's settings as the code here is written for them."""

from collections.abc import Iterator
import contextlib

import jax


@contextlib.contextmanager
def usual_settings() -> Iterator[None]:
  """Computes as JAX does by default, whatever the process has set; a decorator too.

  A process may have `jax_numpy_rank_promotion` or `jax_numpy_dtype_promotion` stricter
  for code of its own, `jax_enable_x64`, though no format is wider than float32, or
  `jax_debug_infs`, though a choice that is ruled out has the logit −∞, a
  `jax_transfer_guard` for its own steps, or `jax_disable_jit`, with which no step keeps
  to its devices.
  """
  with (
    jax.numpy_rank_promotion('allow'),
    jax.numpy_dtype_promotion('standard'),
    jax.enable_x64(False),
    jax.debug_infs(False),
    jax.transfer_guard('allow'),
    jax.disable_jit(False),
  ):
    yield
