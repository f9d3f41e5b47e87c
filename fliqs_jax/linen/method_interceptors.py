"""Interceptors of linen's methods that end where their context does."""

from collections.abc import Callable, Iterator
import contextlib
from typing import Any

from flax import linen as nn


@contextlib.contextmanager
def intercept_methods(interceptor: Callable[..., Any]) -> Iterator[None]:
  """Runs methods of modules through an interceptor, as `nn.intercept_methods` does.

  That one takes the interceptor away in an `assert`, which `python -O` leaves out: it
  would be in all later calls too.
  """
  active = True

  def while_active(call, args, kwargs, context):
    if not active:
      return call(*args, **kwargs)
    return interceptor(call, args, kwargs, context)

  try:
    with nn.intercept_methods(while_active):
      yield
  finally:
    active = False
