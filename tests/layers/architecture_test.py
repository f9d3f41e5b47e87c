"""Supernets against the small networks that they stand for."""

import functools
import itertools
import math

from flax import linen as nn
from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fliqs_jax import models
from fliqs_jax.layers import architecture
from fliqs_jax.layers.architecture import Decision, Table
from fliqs_jax.layers.layer import Layer
from fliqs_jax.layers.variables import FORMATS, LAYER_FORMATS, QUANT_STATS, SIZES, nest
from fliqs_jax.layers.variants import architecture_decisions
from fliqs_jax.linen import discovery
from fliqs_jax.linen import operators as layers
from fliqs_jax.models import resnet
from fliqs_jax.numerics.formats import get_format
from fliqs_jax.numerics.masking import Axes, LayerSizes
from fliqs_jax.numerics.products import LayerFormats
from fliqs_jax.runs.supernet import slice_variables
from fliqs_jax.search import budget, cost_models, latency
from fliqs_jax.search import space as search_space
from fliqs_jax.training import classification

IMAGE = jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32)
MOBILENET = {
  'width': 0.5,
  'small_images': True,
  'stages': ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 2, 2)),
  'last_filters': 32,
  'dropout_rate': 0.0,
}
RESNET = {'num_classes': 10, 'width': 0.125, 'small_images': True}


def mobilenet(choose, **changes):
  options = {**MOBILENET, **changes}
  return models.create_model('mobilenet_v2', 10, choose=choose, **options)


def resnet_of(block, choose):
  conv = functools.partial(nn.Conv, **layers.conv_hooks())
  dense = functools.partial(nn.Dense, **layers.dense_hooks())
  return resnet.ResNet((1, 2), block, choose=choose, conv=conv, dense=dense, **RESNET)


NETWORKS = {
  'mobilenet_v2': functools.partial(mobilenet, stages=MOBILENET['stages'][:2]),
  'resnet_basic': functools.partial(resnet_of, resnet.BasicBlock),
  'resnet_bottleneck': functools.partial(resnet_of, resnet.BottleneckBlock),
}


def discover(model):
  return discovery.discover(model, IMAGE, train=False)


@functools.cache
def space_of(build, formats=('int3', 'int4', 'int8')):
  return search_space.build_space(discover(build(architecture.searched)), formats)


def random_choices(space, rng):
  sizes = space.valid.sum(axis=1)
  return rng.integers(sizes, dtype=np.int32)


def small_model(build, space, choices):
  found = space.architecture_of(choices)
  return build(architecture.fix(space.architecture, found))


def test_tables_are_functions_of_decisions():
  a, b = Decision('a', (1, 3), 1), Decision('b', (2, 5, 7), 5)
  first, second = Table((a,), (1, 3)), Table((b,), (2, 5, 7))
  product = first * second * 10
  assert product.decisions == (a, b)
  assert product.values == (20, 50, 70, 60, 150, 210)
  # Of a decision that comes up twice there is one choice.
  assert (product * first).values == (20, 50, 70, 180, 450, 630)
  assert 4 * first == first * 4 == Table((a,), (4, 12))
  assert architecture.largest(product) == 210 and architecture.largest(6) == 6
  for i, j in itertools.product(range(2), range(3)):
    strides = product.strides()
    index = strides['a'] * i + strides['b'] * j
    assert product.values[index] == 10 * a.options[i] * b.options[j]


# The operator alone: any sizes, formats, strides, groups.


def conv_pass(operator, depthwise, x, w, bound):
  """Returns the result, both gradients and the updated statistics of an operator."""

  def output(x, w):
    variables = {
      FORMATS: bound,
      QUANT_STATS: {'mean_square': jnp.float32(0.7), 'absmax': jnp.float32(2)},
    }
    return operator.apply(
      variables, x, w, (2, 2), ((w.shape[0] // 2,) * 2,) * 2,
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
      feature_group_count=x.shape[-1] if depthwise else 1,
      mutable=[QUANT_STATS],
    )  # fmt: skip

  y, pullback, stats = jax.vjp(output, x, w, has_aux=True)
  # Into the two first channels, which all sizes have.
  shape = (*y.shape[:-1], 2)
  cotangent = jnp.cos(jnp.arange(math.prod(shape), dtype=jnp.float32)).reshape(shape)
  y_bar = jnp.zeros_like(y).at[..., :2].set(cotangent)
  return y, *pullback(y_bar), stats[QUANT_STATS]


@pytest.mark.parametrize('format', ['float32', 'int4'])
@pytest.mark.parametrize('depthwise', [False, True])
def test_masked_operator_equals_the_small_one(format, depthwise):
  inputs, outputs, kernel = (
    Table((Decision(name, options, options[0]),), options)
    for name, options in (('i', (3, 5, 8)), ('o', (2, 6, 7)), ('k', (1, 3, 5)))
  )
  sizes = LayerSizes(inputs, inputs if depthwise else outputs, kernel)
  rng = np.random.default_rng(0)
  x = rng.normal(size=(4, 6, 6, 8)).astype(np.float32)
  w_shape = (5, 5, 1, 8) if depthwise else (5, 5, 8, 7)
  w = rng.normal(size=w_shape).astype(np.float32)
  row = jax.tree.map(jnp.asarray, get_format(format))
  bound = {LAYER_FORMATS: LayerFormats(row, row)}
  masked = layers.QuantizedConv(sizes=sizes)
  masked_pass = jax.jit(
    lambda sizes: conv_pass(
      masked, depthwise, x, w, bound | {SIZES: sizes}
    )
  )
  for i, o, k in ((3, 6, 5), (8, 2, 1), (5, 7, 3)):
    o = i if depthwise else o
    y, x_bar, w_bar, stats = masked_pass(LayerSizes(*map(jnp.int32, (i, o, k))))
    centre, first = slice((5 - k) // 2, (5 + k) // 2), 1 if depthwise else i
    small_w = w[centre, centre, :first, :o]
    small_pass = jax.jit(
      functools.partial(conv_pass, layers.QuantizedConv(), depthwise)
    )
    expected = small_pass(x[..., :i], small_w, bound)
    for got, wanted in zip((y, x_bar), expected):
      np.testing.assert_allclose(got[..., : wanted.shape[-1]], wanted, atol=2e-5)
      np.testing.assert_array_equal(got[..., wanted.shape[-1] :], 0)
    got = w_bar[centre, centre, :first, :o]
    np.testing.assert_allclose(got, expected[2], atol=2e-5)
    assert np.abs(w_bar).sum() == pytest.approx(np.abs(got).sum(), rel=1e-6)
    jax.tree.map(
      functools.partial(np.testing.assert_allclose, rtol=1e-6), stats, expected[3]
    )


# Whole networks.


def random_variables(model, rng):
  def draw(path, leaf):
    if path[-1] == 'kernel':
      value = rng.normal(0, math.sqrt(2 / math.prod(leaf.shape[:-1])), leaf.shape)
    elif path[-1] in ('scale', 'var'):
      value = rng.uniform(0.5, 1.5, leaf.shape)
    else:
      value = rng.uniform(0.1, 0.3, leaf.shape)
    return value.astype(np.float32)

  init = functools.partial(model.init, train=False)
  return traverse_util.path_aware_map(
    draw, jax.eval_shape(init, jax.random.key(0), IMAGE)
  )


def train_pass(model, variables, formats, images, labels):
  """Returns the logits, the gradients and the updated statistics."""
  variables = dict(variables)
  params = variables.pop('params')

  def loss(params):
    logits, stats = model.apply(
      {'params': params, FORMATS: formats, **variables},
      images, train=True, mutable=['batch_stats', 'quant_stats'],
    )  # fmt: skip
    return classification.cross_entropy(logits, labels).mean(), (logits, stats)

  (_, (logits, stats)), gradients = jax.value_and_grad(loss, has_aux=True)(params)
  return logits, gradients, stats


def absent_or(space, choices, block, present):
  """Choices in which a block is there or not."""
  names = [decision.name for decision in space.decisions]
  choices[names.index(f'{block}/present')] = present
  return choices


@pytest.mark.parametrize(
  'name, presences',
  [('mobilenet_v2', (0, 1)), ('resnet_basic', (0,)), ('resnet_bottleneck', (1,))],
)
def test_masked_supernet_equals_the_small_network(name, presences):
  build, rng = NETWORKS[name], np.random.default_rng(1)
  space = space_of(build, ('float32', 'bf16'))
  supernet = build(architecture.searched)
  variables = random_variables(supernet, rng)
  images = rng.normal(size=(8, 8, 8, 1)).astype(np.float32)
  labels = rng.integers(10, size=8)
  masked = jax.jit(
    lambda choices: train_pass(
      supernet, variables, nest(space.layers, space.bind(choices)), images, labels
    )
  )
  for present in presences:
    choices = absent_or(space, random_choices(space, rng), 'stage2_block2', present)
    choices[: len(space.format_decisions)] = 0  # float32
    small = small_model(build, space, choices)
    fixed = search_space.uniform_space(discover(small), 'float32')
    shapes = jax.eval_shape(
      functools.partial(small.init, train=False), jax.random.key(0), IMAGE
    )
    expected = jax.jit(functools.partial(train_pass, small))(
      slice_variables(variables, shapes),
      nest(fixed.layers, fixed.bind(jnp.zeros(0, jnp.int32))), images, labels,
    )  # fmt: skip
    logits, gradients, stats = masked(choices)
    np.testing.assert_allclose(logits, expected[0], atol=1e-5)
    for got, wanted in ((gradients, expected[1]), (stats, expected[2])):
      largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(wanted))
      jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6 * largest),
        slice_variables(got, wanted),
        wanted,
      )
    # Nothing flows into what is masked, skipped blocks included.
    total, kept = (
      sum(float(jnp.abs(leaf).sum()) for leaf in jax.tree.leaves(tree))
      for tree in (gradients, expected[1])
    )
    assert total == pytest.approx(kept, rel=1e-4)
    if not present:
      for path, value in traverse_util.flatten_dict(stats['quant_stats']).items():
        if path[0] == 'stage2_block2':
          before = variables['quant_stats']
          assert value == traverse_util.flatten_dict(before)[path]


# Costs.


@pytest.mark.parametrize('name', NETWORKS)
def test_layers_are_those_of_the_small_network(name):
  build, rng = NETWORKS[name], np.random.default_rng(2)
  space = space_of(build)
  for _ in range(20):
    choices = random_choices(space, rng)
    # Arguments of the operations included, by which latencies are looked up.
    assert space.layers_of(choices) == discover(small_model(build, space, choices))


@pytest.mark.parametrize('name', NETWORKS)
def test_standard_network_is_a_point(name):
  build = NETWORKS[name]
  space = space_of(build)
  found = {decision.name: decision.default for decision in space.architecture}
  assert discover(build(architecture.fix(space.architecture, found))) == discover(
    build(architecture.standard)
  )


@pytest.mark.parametrize('multiplier', [0.5, 0.75, 1.5])
def test_mobilenets_of_other_widths_are_points(multiplier):
  build = functools.partial(
    models.create_model, 'mobilenet_v2', 10, small_images=True, last_filters=64
  )
  decisions = architecture_decisions(
    discover(build(choose=architecture.searched))
  )
  published = discover(build(width=multiplier))
  widths = {layer.path: layer.output_shape[-1] for layer in published}
  found = {decision.name: decision.default for decision in decisions}
  found['stem/width'] = widths['conv_init']
  found['head/width'] = widths['conv_last']
  for stage in range(1, 8):
    found[f'stage{stage}/width'] = widths[f'stage{stage}_block1/project']
  assert discover(build(choose=architecture.fix(decisions, found))) == published


def block_macs(inputs, hidden, outputs, kernel, before, after):
  expand = inputs * hidden * before**2
  depthwise = kernel**2 * hidden * after**2
  return expand, depthwise, hidden * outputs * after**2


def mobilenet_macs(found):
  """Multiply-accumulates of every layer, by the arithmetic of Table 1 of the paper."""
  stem, width = found['stem/width'], found['stage1/width']
  macs = [9 * stem * 64, found['stage1_block1/kernel'] ** 2 * stem * 64]
  macs.append(stem * width * 64)
  extent = 8
  for stage in (2, 3):
    for block in (1, 2):
      name, after = f'stage{stage}_block{block}', 8 >> (stage - 1)
      if block == 2 and not found[f'{name}/present']:
        macs += [0, 0, 0]
        continue
      outputs, kernel = found[f'stage{stage}/width'], found[f'{name}/kernel']
      hidden = width * found[f'{name}/expansion']
      macs += block_macs(width, hidden, outputs, kernel, extent, after)
      width, extent = outputs, after
  head = found['head/width']
  return [*macs, width * head * extent**2, head * 10]


def test_costs_of_a_thousand_architectures():
  space, rng = space_of(mobilenet), np.random.default_rng(3)
  choices = np.stack([random_choices(space, rng) for _ in range(1000)])
  bops = cost_models.get_cost_model('bops')
  per_layer = bops.per_layer(space, choices)
  traced = jax.jit(functools.partial(bops, space))(choices)
  bits = np.array([3, 4, 8])[choices[:, : len(space.layers)]]
  macs = np.array([mobilenet_macs(space.architecture_of(row)) for row in choices])
  np.testing.assert_array_equal(per_layer, macs * bits * bits / 1e9)
  np.testing.assert_allclose(traced, per_layer.sum(axis=-1), rtol=1e-5)


@pytest.mark.parametrize(
  'cost_name', [name for name in cost_models.COST_MODELS if name != 'latency_table']
)
def test_every_cost_is_that_of_the_small_network(cost_name):
  build, rng = NETWORKS['resnet_basic'], np.random.default_rng(4)
  space, model = space_of(build), cost_models.get_cost_model(cost_name)
  for _ in range(20):
    choices = random_choices(space, rng)
    small = search_space.fixed_space(
      space.layers_of(choices), space.formats_of(choices)
    )
    expected = float(model(small, np.zeros(0, np.int32)))
    assert float(model(space, choices)) == pytest.approx(expected, rel=1e-12)


def test_latencies_are_those_of_the_chosen_layers():
  space, rng = space_of(mobilenet), np.random.default_rng(5)
  bits = {'int3': 3, 'int4': 4, 'int8': 8, 'float32': 16, 'bf16': 16}
  times = {
    latency.layer_key(layer): {name: layer.macs * n for name, n in bits.items()}
    for layer in space.variants.layers
    if layer.macs
  }
  table = latency.LatencyTable('table', times, {})
  model = cost_models.get_cost_model('latency_table', table=table)
  compute = cost_models.get_cost_model('linear_compute')
  choices = np.stack([random_choices(space, rng) for _ in range(50)])
  np.testing.assert_allclose(
    model(space, choices), 1e9 * compute(space, choices), rtol=1e-12
  )
  missing = dict(list(times.items())[1:])
  model = cost_models.get_cost_model(
    'latency_table', table=table._replace(times=missing)
  )
  with pytest.raises(ValueError, match='lacks the layer at conv_init'):
    model(space, choices)


# Budgets of costs that are no sums over decisions.


def small_joint_space(seed, formats=('int2', 'int4')):
  """Three layers in a row whose two widths and one presence are searched."""
  rng = np.random.default_rng(seed)
  options = lambda: tuple(sorted(set(rng.integers(4, 40, 3).tolist())))
  widths = [
    Table((Decision(f'width{i}', values, values[0]),), values)
    for i, values in enumerate((options(), options()))
  ]
  present = Table((Decision('present', (0, 1), 1),), (0, 1))
  ends = [8, *widths, 10]
  found = []
  for i in range(3):
    largest = [architecture.largest(ends[i]), architecture.largest(ends[i + 1])]
    sizes = LayerSizes(ends[i], ends[i + 1], None, present if i == 1 else 1)
    found.append(Layer(
        f'layer{i}', 'op', 'dense', (1, largest[0]), tuple(largest), (1, largest[1]),
        math.prod(largest), math.prod(largest), sizes=sizes,
        axes=Axes(1, 0, 1, ()),
    ))  # fmt: skip
  return search_space.build_space(found, formats)


@pytest.mark.parametrize('cost_name', ['bops', 'model_size', 'peak_activation_bytes'])
def test_joint_budgets_against_brute_force(cost_name):
  model = cost_models.get_cost_model(cost_name)
  lost = []
  for seed in range(20):
    space, rng = small_joint_space(seed), np.random.default_rng(seed)
    sizes = space.valid.sum(axis=1)
    everything = np.array(list(itertools.product(*map(range, sizes))), np.int32)
    costs = model(space, everything)
    assert budget.cost_range(space, model) == pytest.approx(
      (costs.min(), costs.max()), rel=1e-12
    )
    log_policy = np.log(rng.dirichlet(np.ones(space.valid.shape[1]), len(sizes)))
    likelihoods = log_policy[np.arange(len(sizes)), everything].sum(axis=1)
    for target in rng.uniform(costs.min(), costs.max(), 4):
      choices = budget.most_likely_within(space, model, log_policy, target)
      assert model(space, choices) <= target
      best = likelihoods[costs <= target].max()
      lost.append(best - log_policy[np.arange(len(sizes)), choices].sum())
  # Greedy repair finds the best choices most times.
  assert np.mean(np.array(lost) < 1e-9) > 0.6


# What a user may get wrong.


@pytest.mark.parametrize(
  'change, words',
  [
    ({'stage9/width': 8}, ('another space', "'stage9/width'", "'stage3/width'")),
    ({'stage1/width': 9}, ('stage1/width=9', 'expected one of 8, 16')),
    ({'stage1/width': None}, ('another space', 'it lacks', "'stage1/width'")),
  ],
)
def test_architectures_of_other_spaces_are_named(change, words):
  decisions = space_of(mobilenet).architecture
  found = {decision.name: decision.default for decision in decisions} | change
  found = {name: size for name, size in found.items() if size is not None}
  with pytest.raises(ValueError) as error:
    architecture.fix(decisions, found)
  assert '\n' not in str(error.value)
  for word in words:
    assert word in str(error.value)


def test_networks_without_choices_are_named():
  with pytest.raises(ValueError, match='expected one of resnet18, .*mobilenet_v2'):
    models.create_model('deit_tiny', 10, choose=architecture.searched)
  with pytest.raises(ValueError, match='quantized layers alone'):
    model = models.create_model(
      'resnet18', 10, quantized=False, choose=architecture.searched
    )
    discover(model)
