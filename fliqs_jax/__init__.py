"""One training run that finds a numeric format for each layer of a network.

fliqs_jax.search           a search over your own network, data and loss
fliqs_jax.evaluate         of what a search left, under its formats or others
fliqs_jax.make_searchable  a network with its layers quantized, for a loop of your own
"""

import importlib

# Imported when they are used: some need TensorFlow, for TensorBoard's files.
_MODULES = {'search': 'api', 'evaluate': 'api', 'make_searchable': 'linen.interception'}
__all__ = list(_MODULES)


def __getattr__(name):
  if name not in _MODULES:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  return getattr(importlib.import_module(f'{__name__}.{_MODULES[name]}'), name)
