"""Search spaces: what is discovered, how decisions are tied, choices and formats."""

import functools
import re

from flax import linen as nn
from flax import traverse_util
import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fliqs_jax import models
from fliqs_jax.layers.variables import FORMATS, LAYER_FORMATS, nest
from fliqs_jax.linen import operators as layers_lib
from fliqs_jax.linen.discovery import discover
from fliqs_jax.numerics.formats import get_format
from fliqs_jax.numerics.products import LayerFormats
from fliqs_jax.search import space as search_space
from fliqs_jax.search.space import build_space

OPTIONS = ('int4', 'e2m1', 'int8', 'bf16')
IMAGE = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)


def _resnet18(**options):
  return models.create_model('resnet18', 1000, **options)


@pytest.fixture(scope='module')
def resnet18():
  return discover(_resnet18(), IMAGE, train=False)


def _block_paths(stage, block, shortcut):
  names = ['conv1', 'conv2'] + (['conv_shortcut'] if shortcut else [])
  return [f'stage{stage}_block{block}/{name}' for name in names]


# Discovery


@pytest.mark.parametrize('project', [False, True])
def test_layers_of_resnet18_are_in_network_order(project):
  layers = discover(_resnet18(project_first_block=project), IMAGE, train=False)
  expected = ['conv_init', *_block_paths(1, 1, project), *_block_paths(1, 2, False)]
  for stage in (2, 3, 4):
    expected += _block_paths(stage, 1, True) + _block_paths(stage, 2, False)
  expected.append('classifier')
  assert [layer.path for layer in layers] == expected
  assert [layer.kind for layer in layers] == ['conv'] * (len(expected) - 1) + ['dense']


@pytest.mark.parametrize(
    ('path', 'macs', 'params', 'kernel_shape', 'output_shape'),
    [
        # 112² positions, 7·7·3 inputs, 64 outputs.
        ('conv_init', 112**2 * 147 * 64, 147 * 64, (7, 7, 3, 64), (1, 112, 112, 64)),
        (
            'stage1_block1/conv1', 56**2 * 9 * 64 * 64, 9 * 64 * 64,
            (3, 3, 64, 64), (1, 56, 56, 64),
        ),
        (
            'stage2_block1/conv1', 28**2 * 9 * 64 * 128, 9 * 64 * 128,
            (3, 3, 64, 128), (1, 28, 28, 128),
        ),
        (
            'stage2_block1/conv_shortcut', 28**2 * 64 * 128, 64 * 128,
            (1, 1, 64, 128), (1, 28, 28, 128),
        ),
        (
            'stage4_block2/conv2', 7**2 * 9 * 512 * 512, 9 * 512 * 512,
            (3, 3, 512, 512), (1, 7, 7, 512),
        ),
        ('classifier', 512 * 1000, 512 * 1000 + 1000, (512, 1000), (1, 1000)),
    ],
)  # fmt: skip
def test_layers_of_resnet18_by_hand(
  resnet18, path, macs, params, kernel_shape, output_shape
):
  (layer,) = [layer for layer in resnet18 if layer.path == path]
  assert layer.macs == macs and layer.params == params
  assert layer.kernel_shape == kernel_shape and layer.output_shape == output_shape


def test_resnet18_has_the_published_number_of_parameters(resnet18):
  variables = jax.eval_shape(
    lambda x: _resnet18().init(jax.random.key(0), x, train=False), IMAGE
  )
  sizes = {
    name: leaf.size
    for name, leaf in traverse_util.flatten_dict(variables['params'], sep='/').items()
  }
  assert sum(sizes.values()) == 11_689_512
  norms = sum(size for name, size in sizes.items() if re.search(r'(^|/)bn', name))
  assert sum(layer.params for layer in resnet18) == 11_689_512 - norms


def test_the_projection_is_one_more_layer(resnet18):
  projected = discover(_resnet18(project_first_block=True), IMAGE, train=False)
  (layer,) = {layer.path: layer for layer in projected}.keys() - {
    layer.path for layer in resnet18
  }
  assert layer == 'stage1_block1/conv_shortcut'
  extra = {layer.path: layer for layer in projected}[layer]
  assert extra.macs == 56**2 * 64 * 64 and extra.params == 64 * 64


def test_the_float_network_has_no_layers_to_search():
  assert discover(_resnet18(quantized=False), IMAGE, train=False) == ()


class _Various(nn.Module):
  """Grouped and one-dimensional convolutions, batched products, a shared layer."""

  hooked: bool = True

  @nn.compact
  def __call__(self, x):
    conv, dense = (
      (layers_lib.conv_hooks(), layers_lib.dense_hooks()) if self.hooked else ({}, {})
    )
    x = nn.Conv(8, (3,), feature_group_count=2, name='grouped', **conv)(x)
    x = nn.Conv(8, (3,), strides=2, feature_group_count=8, name='depthwise', **conv)(x)
    shared = nn.Dense(8, name='shared', **dense)
    x = shared(shared(x))
    x = nn.DenseGeneral((2, 3), name='heads', **dense)(x)
    return nn.DenseGeneral(5, axis=(-2, -1), name='merge', **dense)(x)


@pytest.fixture(scope='module')
def various():
  return discover(_Various(), jax.ShapeDtypeStruct((1, 10, 4), jnp.float32))


def test_macs_of_various_layers_by_hand(various):
  macs = {layer.path: layer.macs for layer in various}
  assert macs == {
    'grouped': 10 * 8 * 3 * 2,  # each output sees 2 of the 4 inputs
    'depthwise': 5 * 8 * 3,
    'shared': 2 * 5 * 8 * 8,  # computed twice
    'heads': 5 * 8 * 6,
    'merge': 5 * 6 * 5,
  }


def test_a_shared_layer_is_one_layer(various):
  (shared,) = [layer for layer in various if layer.path == 'shared']
  assert shared.params == 8 * 8 + 8
  space = build_space(various, OPTIONS)
  assert [d.name for d in space.decisions].count('shared') == 1


def test_bound_formats_reach_every_layer(various):
  # Each layer alone in int2 changes the output of the network; all in float32 do not.
  x = np.random.default_rng(0).normal(size=(2, 10, 4)).astype(np.float32)
  model = _Various()
  variables = jax.jit(model.init)(jax.random.key(0), x)
  space = build_space(various, ('float32', 'int2'), 'weights')

  @jax.jit
  def forward(choices):
    formats = nest(space.layers, space.bind(choices))
    return model.apply({**variables, FORMATS: formats}, x)

  plain = jax.jit(_Various(hooked=False).apply)({'params': variables['params']}, x)
  none = np.zeros(len(space.decisions), np.int32)
  np.testing.assert_allclose(forward(none), plain, rtol=1e-5, atol=1e-6)
  for i in range(len(none)):
    choices = none.copy()
    choices[i] = 1
    assert np.abs(forward(choices) - plain).max() > 1e-3, space.decisions[i].name


def test_a_network_that_is_a_single_layer():
  # Its module path is empty.
  layer = nn.Dense(3, **layers_lib.dense_hooks())
  x = np.random.default_rng(0).normal(size=(1, 4)).astype(np.float32)
  space = build_space(discover(layer, x), ('float32', 'int2'), 'weights')
  variables = layer.init(jax.random.key(0), x)
  outputs = [
    layer.apply({**variables, FORMATS: nest(space.layers, space.bind(choices))}, x)
    for choices in np.array([[0], [1]])
  ]
  assert np.abs(outputs[0] - outputs[1]).max() > 1e-3


# Decisions


def test_tied_operands_share_a_decision(resnet18):
  space = build_space(resnet18, OPTIONS)
  assert [d.name for d in space.decisions] == [layer.path for layer in resnet18]
  assert all(d.options == OPTIONS for d in space.decisions)
  assert space.weights == space.activations == tuple(range(len(resnet18)))
  assert space.valid.shape == (21, 4) and space.valid.all()


def test_separate_operands_have_decisions_of_their_own(resnet18):
  space = build_space(resnet18, OPTIONS, 'separate')
  assert len(space.decisions) == 42
  assert sorted(space.weights + space.activations) == list(range(42))
  for layer, w, a in zip(resnet18, space.weights, space.activations, strict=True):
    assert space.decisions[w].name == f'{layer.path}:weights'
    assert space.decisions[a].name == f'{layer.path}:activations'


def test_weights_alone(resnet18):
  space = build_space(resnet18, OPTIONS, 'weights')
  assert len(space.decisions) == 21
  assert set(space.activations) == {'float32'}


def test_one_decision_for_the_whole_network(resnet18):
  space = build_space(resnet18, OPTIONS, groups=['.*'])
  assert len(space.decisions) == 1
  assert set(space.weights + space.activations) == {0}
  for option, name in enumerate(OPTIONS):
    assigned = space.formats_of(np.array([option]))
    assert set(map(tuple, map(dict.values, assigned.values()))) == {(name, name)}


def test_a_capture_makes_one_decision_for_each_block(resnet18):
  space = build_space(resnet18, OPTIONS, groups=[r'(stage._block.)/.*'])
  blocks = [f'stage{s}_block{b}' for s in (1, 2, 3, 4) for b in (1, 2)]
  assert [d.name for d in space.decisions] == ['conv_init', *blocks, 'classifier']
  for layer, w, a in zip(resnet18, space.weights, space.activations, strict=True):
    assert w == a
    assert space.decisions[w].name == layer.path.split('/')[0]


def test_a_group_without_captures_is_one_decision(resnet18):
  space = build_space(resnet18, OPTIONS, groups=['.*/conv_shortcut'])
  shortcuts = {
    w
    for layer, w in zip(resnet18, space.weights, strict=True)
    if layer.path.endswith('shortcut')
  }
  assert len(shortcuts) == 1 and len(space.decisions) == 21 - 2


def test_groups_with_separate_operands(resnet18):
  space = build_space(resnet18, OPTIONS, 'separate', groups=['.*'])
  assert len(space.decisions) == 2
  assert len(set(space.weights)) == len(set(space.activations)) == 1
  assert space.weights[0] != space.activations[0]


def test_groups_that_capture_the_same_text_stay_apart(resnet18):
  # "Layers that one of them matches share their decisions": not those of two.
  space = build_space(
    resnet18, OPTIONS, groups=['(stage.)_block./conv1', '(stage.)_block./conv2']
  )
  owners = {}
  for layer, w in zip(resnet18, space.weights, strict=True):
    stage, _, rest = layer.path.partition('_')
    if rest.endswith(('conv1', 'conv2')):
      owners.setdefault((stage, rest[-5:]), set()).add(w)
  assert all(len(ids) == 1 for ids in owners.values())
  assert len(set.union(*owners.values())) == 8


def test_pinned_layers_have_no_decision(resnet18):
  pins = [('conv_init|classifier', 'int8'), ('.*/conv_shortcut', 'float32')]
  space = build_space(resnet18, OPTIONS, 'separate', pins=pins)
  expected = {'conv_init': 'int8', 'classifier': 'int8'}
  for layer, w, a in zip(resnet18, space.weights, space.activations, strict=True):
    pinned = 'float32' if layer.path.endswith('shortcut') else expected.get(layer.path)
    if pinned:
      assert (w, a) == (pinned, pinned)
    else:
      assert isinstance(w, int) and isinstance(a, int)
  assert len(space.decisions) == 2 * (21 - 5)
  formats = space.formats_of(np.zeros(len(space.decisions), np.int32))
  assert formats['conv_init'] == {'weights': 'int8', 'activations': 'int8'}
  assert formats['stage1_block1/conv1'] == {'weights': 'int4', 'activations': 'int4'}


def test_pins_and_groups_together(resnet18):
  space = build_space(
    resnet18, OPTIONS, groups=['stage.*'], pins=[('classifier', 'bf16')]
  )
  assert [d.name for d in space.decisions] == ['conv_init', 'stage.*']
  assert space.weights[-1] == 'bf16'


@pytest.mark.parametrize('argument', ['groups', 'pins'])
@pytest.mark.parametrize(
  ('regexes', 'messages'),
  [
    (['nothing'], ["'nothing' matches the whole path of no layer.*conv_init"]),
    # Whole paths: a part of one is no match.
    (['stage1'], ["'stage1' matches the whole path of no layer"]),
    (['(stage'], [r"'\(stage' is not a regular expression"]),
    (
      ['conv.*', '.*init'],
      [r"conv_init is matched by both 'conv\.\*' and '\.\*init'"],
    ),
    (['zzz', '[', 'yyy'], ["'zzz' matches", r"'\[' is not", "'yyy' matches"]),
  ],
)
def test_wrong_regexes_are_all_named(resnet18, argument, regexes, messages):
  value = regexes if argument == 'groups' else [(regex, 'int8') for regex in regexes]
  with pytest.raises(ValueError) as error:
    build_space(resnet18, OPTIONS, **{argument: value})
  lines = str(error.value).splitlines()
  assert len(lines) == len(messages)
  for line, message in zip(lines, messages, strict=True):
    assert re.search(message, line)


def test_a_layer_cannot_be_in_a_group_and_pinned(resnet18):
  with pytest.raises(ValueError, match='classifier is matched by both'):
    build_space(resnet18, OPTIONS, groups=['.*'], pins=[('classifier', 'int8')])


def test_operands_must_be_known(resnet18):
  with pytest.raises(ValueError, match='both'):
    build_space(resnet18, OPTIONS, 'both')


# Choices and formats

SPACES = {
  'tied': {},
  'separate': {'operands': 'separate'},
  'weights': {'operands': 'weights'},
  'blocks': {'groups': [r'(stage._block.)/.*']},
  'whole': {'groups': ['.*']},
  'pinned': {'operands': 'separate', 'pins': [('classifier', 'e4m3')]},
}


@functools.cache
def _space(name):
  layers = discover(_resnet18(width=0.0625), IMAGE, train=False)
  if name == 'ragged':
    # Decisions with different numbers of options, and one operand fixed.
    decisions = tuple(
      search_space.Decision(layer.path, OPTIONS[: 1 + i % len(OPTIONS)])
      for i, layer in enumerate(layers)
    )
    ids = tuple(range(len(layers)))
    return search_space.SearchSpace(layers, decisions, ids, ('e5m2', *ids[1:]))
  return build_space(layers, OPTIONS, **SPACES[name])


NAMES = [*SPACES, 'ragged']


@st.composite
def _space_and_choices(draw):
  name = draw(st.sampled_from(NAMES))
  sizes = _space(name).valid.sum(axis=1)
  choices = [draw(st.integers(0, int(size) - 1)) for size in sizes]
  return name, np.array(choices, np.int32)


@hypothesis.settings(max_examples=150, deadline=None, derandomize=True)
@hypothesis.given(_space_and_choices())
def test_choices_and_formats_are_inverse(case):
  name, choices = case
  space = _space(name)
  assigned = space.formats_of(choices)
  assert list(assigned) == [layer.path for layer in space.layers]
  for i, layer in enumerate(space.layers):
    for operand in search_space.OPERANDS:
      owner = getattr(space, operand)[i]
      expected = (
        owner
        if isinstance(owner, str)
        else space.decisions[owner].options[choices[owner]]
      )
      assert assigned[layer.path][operand] == expected
  back = space.choices_of(assigned)
  assert back.dtype == np.int32
  np.testing.assert_array_equal(back, choices)
  fixed = search_space.fixed_space(space.layers, assigned)
  assert fixed.formats_of(np.zeros(0, np.int32)) == assigned


def _bound_names(space, collection):
  """`formats_of` by what the operators read."""
  flat = traverse_util.flatten_dict(
    collection, is_leaf=lambda _, node: isinstance(node, LayerFormats)
  )
  names = {}
  for (*path, operator, variable), bound in flat.items():
    assert variable == LAYER_FORMATS
    names['/'.join(path)] = (
      operator,
      {
        operand: next(
          name
          for name in space.format_names
          if [np.asarray(f) for f in get_format(name)]
          == [np.asarray(f) for f in getattr(bound, operand)]
        )
        for operand in search_space.OPERANDS
      },
    )
  return names


@pytest.mark.parametrize('name', NAMES)
def test_bound_formats_are_those_of_the_choices(name):
  space = _space(name)
  traces = 0

  @jax.jit
  def bind(choices, quantize_activations):
    nonlocal traces
    traces += 1
    return nest(space.layers, space.bind(choices, quantize_activations))

  sizes = space.valid.sum(axis=1)
  rng = np.random.default_rng(0)
  for _ in range(10):
    choices = rng.integers(sizes).astype(np.int32)
    expected = space.formats_of(choices)
    bound = _bound_names(space, bind(choices, True))
    assert {path: names for path, (_, names) in bound.items()} == expected
    for layer in space.layers:
      assert bound[layer.path][0] == layer.operator
    # Without activations, weights stay as they are.
    for path, (_, names) in _bound_names(space, bind(choices, False)).items():
      assert names == {**expected[path], 'activations': 'float32'}
  assert traces == 1


def test_batches_of_choices():
  space = _space('ragged')
  rng = np.random.default_rng(0)
  choices = rng.integers(space.valid.sum(axis=1), size=(3, 5, len(space.decisions)))
  for batch in (choices.astype(np.int32), jnp.asarray(choices, jnp.int32)):
    ids = space.format_ids(batch)
    for operand in search_space.OPERANDS:
      rows = getattr(ids, operand)
      assert rows.shape == (3, 5, len(space.layers))
      assigned = space.formats_of(choices[1, 2])
      assert [space.format_names[i] for i in np.asarray(rows[1, 2])] == [
        formats[operand] for formats in assigned.values()
      ]


def test_padding_is_invalid():
  space = _space('ragged')
  assert space.valid.shape == (21, 4)
  for row, decision in zip(space.valid, space.decisions, strict=True):
    assert row.sum() == len(decision.options) and row[: row.sum()].all()


def _uniform(space, name):
  return {layer.path: {'weights': name, 'activations': name} for layer in space.layers}


def test_formats_of_another_network_are_an_error():
  space = _space('tied')
  formats = _uniform(space, 'int4')
  del formats['classifier']
  formats['head'] = {'weights': 'int4', 'activations': 'int4'}
  for function in (
      space.choices_of, functools.partial(search_space.fixed_space, space.layers)
  ):  # fmt: skip
    with pytest.raises(ValueError, match='lacks classifier.*no head'):
      function(formats)


def test_formats_outside_the_space_are_an_error():
  with pytest.raises(ValueError, match='conv_init: weights in int2.*int4, e2m1'):
    _space('tied').choices_of(_uniform(_space('tied'), 'int2'))
  with pytest.raises(ValueError, match='conv_init: activations in int4.*float32'):
    _space('weights').choices_of(_uniform(_space('weights'), 'int4'))


def test_formats_that_split_a_decision_are_an_error():
  formats = _uniform(_space('whole'), 'int4')
  formats['classifier'] = {'weights': 'int8', 'activations': 'int8'}
  with pytest.raises(ValueError, match='classifier.*int8.*already has int4'):
    _space('whole').choices_of(formats)
  formats = _uniform(_space('tied'), 'int4')
  formats['classifier'] = {'weights': 'int4', 'activations': 'int8'}
  with pytest.raises(ValueError, match='classifier: activations.*already has int4'):
    _space('tied').choices_of(formats)


@pytest.mark.parametrize('name', ['int4', 'e5m2', 'float32'])
def test_uniform_space(name):
  layers = _space('tied').layers
  space = search_space.uniform_space(layers, name)
  assert space.decisions == ()
  assert space.formats_of(np.zeros(0, np.int32)) == _uniform(space, name)
  bound = _bound_names(space, nest(layers, space.bind(jnp.zeros(0, jnp.int32))))
  assert all(set(names.values()) == {name} for _, names in bound.values())
