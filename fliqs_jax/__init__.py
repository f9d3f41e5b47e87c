"""One training run that finds a numeric format for each layer of a network.

    result = fliqs_jax.search(model, train_batches, eval_batches, num_steps=1000)

search           a search over your own network, data and loss
search_front     searches for several targets, with one supernet for all
train            the same network trained in fixed formats
Result           what they return: formats, weights, cost, history
evaluate         the quality of what a run left, under its formats or others
overview         the layers of a network and its costs, before anything is trained
make_searchable  a network with its layers quantized, for a loop of your own
default_config   the fields of a config, which `search` and the commands take
ConfigError      a mistake in what was asked for
RunError         a run that cannot go on
Preempted        a run that was asked to stop, and goes on when it is started again

The parts, for programs of their own, are the folders `numerics`, `layers`, `linen`,
`nnx`, `models`, `search`, `data`, `training`, `runs` and `reporting`. Those of
`search`, which is a function here, are imported as in
`from fliqs_jax.search import space`; the command `fliqs_jax.overview` is started by
`python -m`.

Shapes in docstrings have the same letters everywhere: S samples of the policy in a
step, B examples of a batch, N decisions, K options of a decision or formats of a table,
L layers of a network, H, W and C height, width and channels of an image.
"""

import importlib
import sys
import types

# Imported when they are used: who needs one part may lack what others import.
_MODULES = {
  'ConfigError': 'errors',
  'Preempted': 'errors',
  'RunError': 'errors',
  'Result': 'api.results',
  'default_config': 'runs.config',
  'evaluate': 'api.inspection',
  'make_searchable': 'api.own_network',
  'overview': 'api.inspection',
  'search': 'api.training',
  'search_front': 'api.training',
  'train': 'api.training',
}
__all__ = list(_MODULES)


def __getattr__(name):
  if name not in _MODULES:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  return getattr(importlib.import_module(f'{__name__}.{_MODULES[name]}'), name)


def _kept(name):
  """Returns the attribute that no import of a module of that name replaces."""
  return property(lambda package: __getattr__(name), lambda package, module: None)


class _Package(types.ModuleType):
  """The package, whose functions keep their names beside modules of the same ones."""

  search, overview = _kept('search'), _kept('overview')


sys.modules[__name__].__class__ = _Package
