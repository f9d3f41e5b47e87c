"""Groups of layers by name: those that one kernel computes where a network is deployed.

A runtime that fuses the projections of attention into one product, or the two of a
gated MLP, needs one format for them.
"""

from collections.abc import Sequence
import re

from fliqs_jax.errors import ConfigError
from fliqs_jax.layers.layer import Layer

# The names that layers of one parent have, as networks call them.
GROUPS: dict[str, tuple[tuple[str, ...], ...]] = {
  'qkv': (
    ('query', 'key', 'value'),  # of Flax's own attention, and BERT
    ('q_proj', 'k_proj', 'v_proj'),  # Llama, Gemma, CLIP
    ('q', 'k', 'v'),  # T5
  ),
  'gate_up': (
    ('gate_proj', 'up_proj'),  # Llama, Gemma
    ('gate', 'up'),
    ('wi_0', 'wi_1'),  # T5
  ),
}


def expand(groups: Sequence[str], layers: Sequence[Layer]) -> list[str]:
  """Returns groups as regexes on whole module paths, names in `GROUPS` expanded.

  A parent whose layers are to share a decision has a regex of its own, which captures
  the parent's path.

  Args:
    groups: names in `GROUPS`, and regexes, which stay as they are.
    layers: of the network.

  Raises:
    ConfigError: where the network has no layers that a name would tie.
  """
  regexes = []
  for group in groups:
    regexes += _regexes(group, layers) if group in GROUPS else [group]
  return regexes


def _regexes(group, layers):
  children = {}  # parent -> names of its layers
  for layer in layers:
    parent, _, name = layer.path.rpartition('/')
    children.setdefault(parent, set()).add(name)
  regexes = [
    f'({re.escape(parent)})/(?:{"|".join(names)})' if parent else '|'.join(names)
    for parent, own in children.items()
    for names in GROUPS[group]
    if len(own & set(names)) > 1
  ]
  if not regexes:
    expected = ', or '.join('/'.join(names) for names in GROUPS[group])
    raise ConfigError(
      f'search.groups={group!r} ties layers of one parent that are called {expected}: '
      'the network has none; expected a regex on whole module paths in its place'
    )
  return regexes
