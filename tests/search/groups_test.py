"""Groups by name: which layers share a decision, and where none do."""

from flax import linen as nn
import jax.numpy as jnp
import pytest

from fliqs_jax.errors import ConfigError
from fliqs_jax.layers.layer import Layer
from fliqs_jax.linen.discovery import discover
from fliqs_jax.linen.interception import make_searchable
from fliqs_jax.models import create_model
from fliqs_jax.search.space import build_space

OPTIONS = ('int4', 'int8')


def decisions(layers, *groups, **options):
  """Returns the paths of the layers of each decision on weights."""
  space = build_space(layers, OPTIONS, groups=groups, **options)
  tied = {}
  for layer, decision in zip(space.layers, space.weights):
    tied.setdefault(space.decisions[decision].name, []).append(layer.path)
  return tied


def named(*paths):
  return [Layer(path, 'op', 'dense', (1, 8), (8, 8), (1, 8), 64, 64) for path in paths]


def test_the_projections_of_flax_attention_share_a_decision():
  network = nn.Sequential([nn.SelfAttention(2), nn.SelfAttention(2)])
  layers = discover(make_searchable(network), jnp.ones((1, 3, 4)))
  assert decisions(layers, 'qkv') == {
    f'layers_{i}{suffix}': [f'layers_{i}/{name}' for name in names]
    for i in (0, 1)
    for suffix, names in (('', ('query', 'key', 'value')), ('/out', ('out',)))
  }


LLAMA = [
  f'block{i}/{name}'
  for i in (0, 1)
  for name in (
    'attention/q_proj', 'attention/k_proj', 'attention/v_proj', 'attention/o_proj',
    'mlp/gate_proj', 'mlp/up_proj', 'mlp/down_proj',
  )
]  # fmt: skip


def test_both_names_and_a_regex_together():
  tied = decisions(named(*LLAMA, 'head'), 'qkv', 'gate_up', '.*/(?:o|down)_proj')
  assert {name: len(paths) for name, paths in tied.items()} == {
    'block0/attention': 3, 'block0/mlp': 2, 'block1/attention': 3, 'block1/mlp': 2,
    '.*/(?:o|down)_proj': 4, 'head': 1,
  }  # fmt: skip
  space = build_space(named(*LLAMA), OPTIONS, 'separate', groups=['qkv', 'gate_up'])
  # Of each block two groups and two layers by themselves.
  assert len(space.decisions) == 2 * 2 * 4


def test_layers_at_the_top_and_grouped_queries():
  # Of one parent, whatever else it holds, and also where there is no value.
  tied = decisions(named('q', 'k', 'out', 'inner/q', 'gate', 'up'), 'qkv', 'gate_up')
  assert [*tied.values()] == [['q', 'k'], ['out'], ['inner/q'], ['gate', 'up']]


def test_a_residual_stream_has_one_decision():
  tied = decisions(named(*LLAMA, 'head'), 'residual', 'qkv')
  assert sorted(map(len, tied.values())) == [1] * 5 + [3] * 2 + [4]
  (stream,) = (paths for paths in tied.values() if len(paths) == 4)
  assert stream == [
    f'block{i}/{name}' for i in (0, 1) for name in ('attention/o_proj', 'mlp/down_proj')
  ]


def test_each_list_of_blocks_has_a_stream():
  layers = [
    f'{side}/layers/{i}/{name}'
    for side in ('encoder', 'decoder')
    for i in (0, 1)
    for name in ('self_attn/out', 'mlp/up', 'mlp/down')
  ]
  tied = decisions(named(*layers, 'out'), 'residual')
  assert {name: len(paths) for name, paths in tied.items() if len(paths) > 1} == {
    'encoder/layers': 4, 'decoder/layers': 4,
  }  # fmt: skip
  # A layer outside of the blocks writes into none.
  assert tied['out'] == ['out']


def test_residual_streams_of_our_own_networks():
  model = create_model('transformer_lm', 16, depth=2)
  layers = discover(model, jnp.ones((1, 4), jnp.int32), train=False)
  tied = max(decisions(layers, 'residual').values(), key=len)
  assert tied == [
    f'block{i}/{name}' for i in (1, 2) for name in ('attention/out', 'down')
  ]


@pytest.mark.parametrize(
  'group, paths',
  [
    ('qkv', ['block/qkv', 'block/out']),  # one product already
    ('gate_up', ['block/up', 'block/down']),  # no gate
    ('residual', ['block0/up', 'block0/out', 'down']),  # of no block
    ('qkv', ['a/query', 'b/key', 'c/value']),  # of no common parent
  ],
)
def test_a_name_that_ties_nothing_is_refused(group, paths):
  with pytest.raises(
    ConfigError, match=f"groups='{group}' ties (the )?layers of "
  ) as e:
    decisions(named(*paths), group)
  assert len(e.value.problems) == 1


@pytest.mark.parametrize('name', ['residua', 'gate-up', 'qkvs', 'residuals'])
def test_a_name_with_a_mistake_is_told_what_is_meant(name):
  with pytest.raises(ConfigError, match=f"{name}': expected qkv, gate_up, residual or"):
    decisions(named('a/query', 'a/key'), name)


@pytest.mark.parametrize('regex', ['gate.*', 'residual.*', '(qkv)s', 'gate_up[12]'])
def test_a_regex_like_a_name_is_one(regex):
  paths = ('gate_up1', 'gate_up2') if regex[0] == 'g' else ('qkvs', 'residual1')
  assert decisions(named(*paths), regex)


def test_what_is_part_of_a_path_is_a_regex():
  with pytest.raises(ConfigError, match="'residual1' matches the whole path of no"):
    decisions(named('residual1/a'), 'residual1')
