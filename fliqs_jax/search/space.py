"""The decisions of a search: discovered, grouped, pinned; choices ⇄ formats.

A *layer* is a quantized operator of the network. A *decision* picks one format out of
several options, for one or more operands (weights or activations) of layers, or one
size of the network's architecture. An option may be a pair of formats
(`options`). *Choices* are one option index for each decision, `int32[N]`; the package's
docstring explains the letters.

Examples:
  >>> from flax import linen as nn
  >>> import jax.numpy as jnp
  >>> import numpy as np
  >>> from fliqs_jax.linen.discovery import discover
  >>> from fliqs_jax.linen.interception import make_searchable
  >>> from fliqs_jax.search.cost_models import get_cost_model
  >>> from fliqs_jax.search.space import build_space
  >>> model = make_searchable(nn.Sequential([nn.Dense(4), nn.relu, nn.Dense(2)]))
  >>> layers = discover(model, jnp.ones((1, 8)))
  >>> space = build_space(layers, ('int2', 'int4', 'int8'))
  >>> [decision.name for decision in space.decisions]
  ['layers_0', 'layers_2']
  >>> bops = get_cost_model('bops')  # in 10⁹
  >>> round(1e9 * float(bops(space, np.array([2, 0]))))  # 32·8·8 + 8·2·2
  2080
"""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import operator
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fliqs_jax.errors import ConfigError
from fliqs_jax.layers import architecture
from fliqs_jax.layers.architecture import Table
from fliqs_jax.layers.layer import PAIR, BoundLayer, Layer
from fliqs_jax.layers.variants import Variants, find_variants
from fliqs_jax.numerics import formats
from fliqs_jax.numerics.masking import LayerSizes
from fliqs_jax.numerics.products import LayerFormats
from fliqs_jax.search.groups import expand
from fliqs_jax.search.options import OPERANDS, format_names, split

UNQUANTIZED = 'float32'
SEARCHED_OPERANDS = ('tied', 'separate', 'weights', 'pairs')


class Decision(NamedTuple):
  """A choice of one format, or of one size, out of several."""

  name: str
  options: tuple[str, ...]  # formats, pairs of them, or sizes in decimals


@dataclasses.dataclass(frozen=True)
class SearchSpace:
  """The formats that every operand of every layer can have, and the layers' sizes.

  Attributes:
    layers: the L layers, in network order.
    format_decisions: the decisions on formats.
    weights: for each layer the index of the decision on its weights, or the name of
      the format that they are fixed to.
    activations: the same for the activations.
  """

  layers: tuple[Layer, ...]
  format_decisions: tuple[Decision, ...]
  weights: tuple[int | str, ...]
  activations: tuple[int | str, ...]

  @functools.cached_property
  def architecture(self) -> tuple[architecture.Decision, ...]:
    """The A decisions on sizes, whose choices follow those on formats."""
    return self.variants.decisions

  @functools.cached_property
  def decisions(self) -> tuple[Decision, ...]:
    """All N decisions."""
    return self.format_decisions + tuple(
      Decision(name, tuple(map(str, options))) for name, options, _ in self.architecture
    )

  @functools.cached_property
  def format_names(self) -> tuple[str, ...]:
    """The names in `format_table`, which has a row for every format in use."""
    decisions = self.format_decisions
    searched = format_names(o for decision in decisions for o in decision.options)
    fixed = [a for a in self.weights + self.activations if isinstance(a, str)]
    return tuple(dict.fromkeys([*searched, *fixed, UNQUANTIZED]))

  @functools.cached_property
  def valid(self) -> np.ndarray:
    """bool[N, K], which entries of a padded table of options exist."""
    sizes = np.array([len(d.options) for d in self.decisions], np.int32)
    return np.arange(max(sizes, default=0)) < sizes[:, None]

  @functools.cached_property
  def _option_ids(self) -> LayerFormats:
    """int32[F, K] each, the rows in the format table of options, 0 where padded."""
    ids = np.zeros((2, len(self.format_decisions), *self.valid.shape[1:]), np.int32)
    for i, decision in enumerate(self.format_decisions):
      for k, option in enumerate(decision.options):
        ids[:, i, k] = list(map(self.format_names.index, split(option)))
    return LayerFormats(*ids)

  @functools.cached_property
  def _pairs(self) -> np.ndarray:
    """bool[L], which layers multiply two activations."""
    return np.array([layer.kind == PAIR for layer in self.layers], bool)

  def format_ids(self, choices: jax.Array | np.ndarray) -> LayerFormats:
    """Returns the row of each operand's format in `format_names`.

    Args:
      choices: int32[..., N]; numpy in, numpy out.

    Returns:
      `LayerFormats` of int32[..., L].
    """
    return LayerFormats(
      self._operand_ids(choices, self._option_ids.weights, self.weights),
      self._operand_ids(choices, self._option_ids.activations, self.activations),
    )

  def _operand_ids(self, choices, option_ids, assigned):
    """Returns the row of one operand's format in `format_names`, int32[..., L]."""
    numpy = np if isinstance(choices, np.ndarray) else jnp
    offset = len(self.format_decisions)
    chosen = numpy.asarray(option_ids)[np.arange(offset), choices[..., :offset]]
    fixed = numpy.broadcast_to(
      np.arange(len(self.format_names), dtype=np.int32),
      (*chosen.shape[:-1], len(self.format_names)),
    )
    places = [
      a if isinstance(a, int) else offset + self.format_names.index(a) for a in assigned
    ]
    return numpy.concatenate([chosen, fixed], axis=-1)[..., places]

  def bind(
    self,
    choices: jax.Array,
    quantize_activations: jax.Array | bool = True,
    quantize_weights: jax.Array | bool = True,
  ) -> dict[str, BoundLayer]:
    """Returns the formats of each layer, and its sizes, by path.

    Args:
      choices: int32[N], may be traced.
      quantize_activations: a traced scalar; where False, all activations are left
        unquantized.
      quantize_weights: the same for the weights.
    """
    table = formats.stack(self.format_names)
    weights, activations = self.format_ids(choices)
    unquantized = self.format_names.index(UNQUANTIZED)
    if self._pairs.any():  # whose second operand is an activation too
      quantize_weights = jnp.where(self._pairs, quantize_activations, quantize_weights)
    activations = jnp.where(quantize_activations, activations, unquantized)
    weights = jnp.where(quantize_weights, weights, unquantized)
    rows = jax.tree.map(
      lambda field: LayerFormats(
        jnp.asarray(field)[weights], jnp.asarray(field)[activations]
      ),
      table,
    )
    layer_formats = LayerFormats(
      *(
        jax.tree.map(
          operator.attrgetter(operand), rows, is_leaf=lambda r: type(r) is LayerFormats
        )
        for operand in OPERANDS
      )
    )
    bound = {
      layer.path: BoundLayer(jax.tree.map(lambda field, i=i: field[i], layer_formats))
      for i, layer in enumerate(self.layers)
    }
    for layer in self.layers:
      if layer.sizes is not None:
        sizes = LayerSizes(*(self._chosen_size(size, choices) for size in layer.sizes))
        bound[layer.path] = bound[layer.path]._replace(sizes=sizes)
    return bound

  def _chosen_size(self, size, choices):
    """The value of a table, int32[]; None of what is not searched."""
    if not isinstance(size, Table):
      return None
    strides = size.strides()
    row = [strides.get(decision.name, 0) for decision in self.architecture]
    index = self.architecture_choices(choices) @ np.array(row, np.int32)
    return jnp.asarray(size.values, jnp.int32)[index]

  @functools.cached_property
  def variants(self) -> Variants:
    """All that the layers can become."""
    return find_variants(self.layers)

  def architecture_choices(self, choices: jax.Array | np.ndarray):
    """Returns those of choices [..., N] that decide sizes, [..., A]."""
    return choices[..., len(self.format_decisions) :]

  def layers_of(self, choices: np.ndarray) -> tuple[Layer, ...]:
    """Returns the layers of the network of choices int32[N], without skipped ones."""
    return self.variants.chosen(self.architecture_choices(np.asarray(choices)))

  def architecture_of(self, choices: np.ndarray) -> dict[str, int]:
    """Returns `{decision: size}` of choices int32[N]."""
    chosen = self.architecture_choices(np.asarray(choices))
    return {
      decision.name: decision.options[choice]
      for decision, choice in zip(self.architecture, chosen)
    }

  def without_format_decisions(self) -> 'SearchSpace':
    """Returns the space in which every operand has the first of its formats."""
    return dataclasses.replace(
      self,
      format_decisions=(),
      **{
        operand: tuple(
          getattr(split(self.format_decisions[a].options[0]), operand)
          if isinstance(a, int)
          else a
          for a in getattr(self, operand)
        )
        for operand in OPERANDS
      },
    )

  def formats_of(self, choices: np.ndarray) -> dict[str, dict[str, str]]:
    """Returns `{module path: {'weights': name, 'activations': name}}`.

    Args:
      choices: int32[N]. Layers that they skip are left out.
    """
    ids = self.format_ids(np.asarray(choices))
    present = {layer.path for layer in self.layers_of(choices)}
    return {
      layer.path: {
        operand: self.format_names[getattr(ids, operand)[i]] for operand in OPERANDS
      }
      for i, layer in enumerate(self.layers)
      if layer.path in present
    }

  def choices_of(self, formats: Mapping[str, Mapping[str, str]]) -> np.ndarray:
    """The inverse of `formats_of` where the architecture is fixed: returns int32[N].

    Raises:
      ConfigError: where the formats are for other layers or outside the space.
    """
    check_layers(self.layers, formats)
    left = [list(decision.options) for decision in self.decisions]
    for operand in OPERANDS:
      for layer, assigned in zip(self.layers, getattr(self, operand)):
        name, fixed = formats[layer.path][operand], isinstance(assigned, str)
        options = (assigned,) if fixed else self.decisions[assigned].options
        with_name = [o for o in options if getattr(split(o), operand) == name]
        if not with_name:
          raise ConfigError(
            f'{layer.path}: {operand} in {name} are outside the search space, '
            f'which has {", ".join(options)}'
          )
        if fixed:
          continue
        before = left[assigned]
        left[assigned] = [option for option in before if option in with_name]
        if not left[assigned]:
          raise ConfigError(
            f'{layer.path}: {operand} in {name}, but the decision '
            f'{self.decisions[assigned].name!r} already has {" or ".join(before)}'
          )
    return np.array(
      [d.options.index(first) for d, (first, *_) in zip(self.decisions, left)], np.int32
    )


def check_layers(
  layers: Sequence[Layer], formats: Mapping[str, Mapping[str, str]]
) -> None:
  """Raises ConfigError where `formats` is no assignment for exactly these layers."""
  paths = {layer.path for layer in layers}
  missing = [layer.path for layer in layers if layer.path not in formats]
  unknown = [path for path in formats if path not in paths]
  if missing or unknown:
    parts = [
      f'{what} {", ".join(names[:3])}{" …" if len(names) > 3 else ""}'
      for what, names in (('it lacks', missing), ('the network has no', unknown))
      if names
    ]
    raise ConfigError(f'the formats are for another network: {"; ".join(parts)}')


def check_blocks(space: SearchSpace) -> None:
  """Raises ConfigError where a layer may get blocks longer than its contraction.

  The message has one line for each format that is concerned.
  """
  unfit = {}  # format name -> layers
  for layer, *assigned in zip(space.layers, space.weights, space.activations):
    for a in assigned:
      options = (a,) if isinstance(a, str) else space.format_decisions[a].options
      for name in format_names(options):
        block = formats.find_format(name).block
        if block and block.size > layer.contraction_length:
          unfit.setdefault(name, {})[layer.path] = layer.contraction_length
  if unfit:
    raise ConfigError(
      *(
        f'{name} has blocks of {formats.find_format(name).block.size} values: expected '
        'as many along the contraction of each layer, found '
        + _shorten([f'{path} ({length})' for path, length in lengths.items()])
        + '; pin these to formats without blocks, as search.pins=(("conv_init", '
        '"bf16"),)'
        for name, lengths in unfit.items()
      )
    )


def fixed_space(
  layers: Sequence[Layer], formats: Mapping[str, Mapping[str, str]]
) -> SearchSpace:
  """Returns the space without decisions in which every layer has the given formats.

  Raises:
    ConfigError: where `formats` is not for these layers.
  """
  check_layers(layers, formats)
  weights, activations = (
    tuple(formats[layer.path][operand] for layer in layers) for operand in OPERANDS
  )
  return SearchSpace(tuple(layers), (), weights, activations)


def uniform_space(layers: Sequence[Layer], name: str) -> SearchSpace:
  """Returns the fixed space in which every layer has one format, or one pair."""
  weights, activations = ((operand,) * len(layers) for operand in split(name))
  return SearchSpace(tuple(layers), (), weights, activations)


def build_space(
  layers: Sequence[Layer],
  options: Sequence[str],
  operands: str = 'tied',
  groups: Sequence[str] = (),
  pins: Sequence[tuple[str, str]] = (),
) -> SearchSpace:
  """Returns the search space over the layers of a network, and over their sizes.

  Args:
    layers: from `discover`.
    options: the names of the formats to choose from, or pairs of them.
    operands: `tied` and `pairs`: a layer's weights and activations share one decision,
      and may differ where its options are pairs; `separate`: each has its own, as have
      the two operands of a product of activations; `weights`: activations are not
      quantized.
    groups: regexes on whole module paths, and names in `groups.NAMES`. Layers that
      one of them matches share their decisions; if it has capture groups, only those
      that capture the same text do, so `(stage._block.)/.*` makes one decision for each
      block.
    pins: pairs of a regex on whole module paths and the format, or pair of formats,
      that the weights and activations of the matching layers are fixed to.

  Raises:
    ConfigError: where a regex is invalid or matches nothing, two match one layer, or
      pairs are options of operands that are decided one by one; one line for each
      problem.
  """
  _check_operands(operands, options)
  groups = expand(groups, layers)
  owner = _match_all([*groups, *(regex for regex, _ in pins)], layers)
  decisions = _Decisions(operands)
  pairs = [
    _decided(decisions, layer, owner.get(layer.path), dict(pins)) for layer in layers
  ]
  return SearchSpace(
    layers=tuple(layers),
    format_decisions=tuple(
      Decision(name, tuple(options)) for name in decisions.names.values()
    ),
    weights=tuple(weights for weights, _ in pairs),
    activations=tuple(activations for _, activations in pairs),
  )


def _check_operands(operands, options):
  if operands not in SEARCHED_OPERANDS:
    raise ConfigError(
      f'unknown operands {operands!r}: expected one of {", ".join(SEARCHED_OPERANDS)}'
    )
  paired = [option for option in options if ':' in option]
  if paired and operands in ('separate', 'weights'):
    raise ConfigError(
      f'{paired[0]} is a pair of formats, for weights and activations together: '
      f'expected search.weights_and_activations=tied or pairs, found {operands}'
    )


class _Decisions:
  """Names of decisions, by what they are for, in the order in which they come."""

  def __init__(self, operands):
    self.operands = operands
    self.names = {}

  def index(self, key, name, suffix=''):
    """Returns the decision's index; it is made where there is none yet."""
    if (key, suffix) not in self.names:
      taken = self.names.values()
      unique = name + suffix if name + suffix not in taken else f'{key}{suffix}'
      self.names[key, suffix] = unique
    return list(self.names).index((key, suffix))


def _decided(decisions, layer, match, pinned):
  """Returns the decision, or fixed format, of a layer's weights and activations."""
  if match and match.re.pattern in pinned:
    pair = split(pinned[match.re.pattern])
    return pair.weights, pair.activations
  if layer.kind == PAIR and decisions.operands == 'weights':  # it has none
    return UNQUANTIZED, UNQUANTIZED
  key, name = layer.path, layer.path
  if match:
    key = match.re.pattern, *match.groups()
    name = '/'.join(filter(None, match.groups())) or match.re.pattern
  if decisions.operands == 'separate':
    weights = decisions.index(key, name, ':weights')
    return weights, decisions.index(key, name, ':activations')
  weights = decisions.index(key, name)
  return weights, UNQUANTIZED if decisions.operands == 'weights' else weights


def _match_all(regexes, layers):
  """Returns `{layer path: match}`; every regex must match, no layer twice."""
  problems, owner = [], {}
  for regex in regexes:
    try:
      pattern = re.compile(regex)
    except re.error as error:
      problems.append(f'{regex!r} is not a regular expression: {error}')
      continue
    matches = [m for layer in layers if (m := pattern.fullmatch(layer.path))]
    if not matches:
      problems.append(
        f'{regex!r} matches the whole path of no layer; the layers are '
        f'{_shorten([layer.path for layer in layers])}'
      )
    for match in matches:
      if match.string in owner:
        problems.append(
          f'{match.string} is matched by both {owner[match.string].re.pattern!r} '
          f'and {regex!r}'
        )
      owner[match.string] = match
  if problems:
    raise ConfigError('\n'.join(problems))
  return owner


def _shorten(names):
  return ', '.join(names[:6]) + (f' … {names[-1]}' if len(names) > 6 else '')
