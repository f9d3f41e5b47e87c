"""Groups of layers by name: those that one kernel computes where a network is deployed.

A runtime that fuses the projections of attention into one product, or the two of a
gated MLP, needs one format for them. So does one that keeps a residual stream in one
format, for all layers that write into it.
"""

from collections.abc import Sequence
import difflib
import re

from fliqs_jax.errors import ConfigError, not_among
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
# The names of the last layers of the two branches of a transformer's blocks.
RESIDUAL = 'residual'
RESIDUAL_LAYERS = (
  ('out', 'down'),  # ours
  ('out', 'mlp_out'),
  ('o_proj', 'down_proj'),  # Llama, Gemma
  ('out_proj', 'fc2'),  # CLIP, OPT
  ('o', 'wo'),  # T5
)
NAMES = (*GROUPS, RESIDUAL)
_NOT_IN_NAMES = re.compile(r'[^\w-]')  # but in regexes, as `gate.*`
# The first module with a number is a block, or one of a list of them.
_BLOCK = re.compile(r'((?:[^/\d]+/)*)[^/]*\d[^/]*/(?:.*/)?([^/]+)')


def expand(groups: Sequence[str], layers: Sequence[Layer]) -> list[str]:
  """Returns groups as regexes on whole module paths, names in `GROUPS` expanded.

  A parent whose layers are to share a decision has a regex of its own, which captures
  the parent's path.

  Args:
    groups: names in `NAMES`, and regexes, which stay as they are.
    layers: of the network.

  Raises:
    ConfigError: where the network has no layers that a name would tie.
  """
  regexes = []
  for group in groups:
    if group == RESIDUAL:
      regexes += _residual(layers)
    elif group in GROUPS:
      regexes += _regexes(group, layers)
    else:
      _check_is_regex(group, layers)
      regexes.append(group)
  return regexes


def _check_is_regex(group, layers):
  """Checks that a group which matches nothing is no name with a mistake in it."""
  if not difflib.get_close_matches(group, NAMES) or _NOT_IN_NAMES.search(group):
    return
  if any(group in layer.path for layer in layers):
    return
  expected = f'{", ".join(NAMES)} or a regex on whole module paths'
  raise ConfigError(not_among(f'search.groups={group!r}', group, NAMES, expected))


def _residual(layers):
  """Returns a regex for each list of blocks, which share a residual stream."""
  writers = {}  # path of the list -> names of layers in its blocks
  for layer in layers:
    if match := _BLOCK.fullmatch(layer.path):
      writers.setdefault(match[1], set()).add(match[2])
  regexes = [
    _parent(stack) + rf'[^/]*\d[^/]*/(?:.*/)?(?:{"|".join(names)})'
    for stack, own in writers.items()
    for names in RESIDUAL_LAYERS
    if own >= set(names)
  ]
  if not regexes:
    expected = ', or '.join('/'.join(names) for names in RESIDUAL_LAYERS)
    raise ConfigError(
      f'search.groups={RESIDUAL!r} ties the layers of numbered blocks that are called '
      f'{expected}: the network has none; expected a regex on whole module paths in '
      'its place'
    )
  return regexes


def _parent(path):
  return f'({re.escape(path[:-1])})/' if path else ''


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
