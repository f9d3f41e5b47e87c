"""One training run that finds a numeric format for each layer of a network.

fliqs_jax.search           a search over your own network, data and loss
fliqs_jax.evaluate         of what a search left, under its formats or others
fliqs_jax.make_searchable  a network with its layers quantized, for a loop of your own

Shapes in docstrings have the same letters everywhere: S samples of the policy in a
step, B examples of a batch, N decisions, K options of a decision or formats of a table,
L layers of a network, H, W and C height, width and channels of an image.
"""

import importlib
import sys
import types

# Imported when they are used: some need TensorFlow, for TensorBoard's files.
_MODULES = {'search': 'api', 'evaluate': 'api', 'make_searchable': 'linen.interception'}
__all__ = list(_MODULES)


def __getattr__(name):
  if name not in _MODULES:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  return getattr(importlib.import_module(f'{__name__}.{_MODULES[name]}'), name)


class _Package(types.ModuleType):
  """The package, whose `search` is the function and not the folder of that name."""

  # Whoever imports from the folder would else replace the function by it.
  search = property(lambda package: __getattr__('search'), lambda package, folder: None)


sys.modules[__name__].__class__ = _Package
