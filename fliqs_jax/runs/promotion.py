"""JAX's promotion of shapes and types as the code here is written for it."""

from collections.abc import Iterator
import contextlib

import jax


@contextlib.contextmanager
def usual_promotion() -> Iterator[None]:
  """Promotes as JAX does by default, whatever the process has set; a decorator too.

  A process may have `jax_numpy_rank_promotion` or `jax_numpy_dtype_promotion` stricter
  for code of its own.
  """
  with jax.numpy_rank_promotion('allow'), jax.numpy_dtype_promotion('standard'):
    yield
