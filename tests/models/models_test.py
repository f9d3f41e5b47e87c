"""Every network goes through the same tests; a new one needs a row in `NETWORKS`."""

import functools
from typing import NamedTuple

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fliqs_jax import models
from fliqs_jax.linen import discovery
from fliqs_jax.models.common import make_divisible
from fliqs_jax.search import cost_models

SMALL = {'width': 0.25, 'small_images': True}
SMALL_DEIT = {'width': 0.5, 'patch_size': 2}


class Network(NamedTuple):
  """Published counts of a network with 1000 classes, and its small images."""

  params: int
  convs: int
  denses: int
  gmacs: str  # 10⁹ multiply-accumulates, those that costs leave out included
  small: dict  # options for images of 8×8
  image_size: int = 224


# Parameters and multiply-accumulates are those that torchvision publishes with its
# weights, and for DeiT timm's and the arithmetic of `test_macs_of_a_transformer`. There
# EfficientNet-B2 is measured at 288².
NETWORKS = {
  'resnet18': Network(11_689_512, 20, 1, '1.814', SMALL),
  'resnet34': Network(21_797_672, 36, 1, '3.664', SMALL),
  'resnet50': Network(25_557_032, 53, 1, '4.089', SMALL),
  'resnet101': Network(44_549_160, 104, 1, '7.801', SMALL),
  'mobilenet_v2': Network(3_504_872, 52, 1, '0.301', SMALL),
  'inception_v3': Network(23_834_568, 94, 1, '5.713', SMALL, 299),
  'efficientnet_b0': Network(5_288_548, 49, 1, '0.386', SMALL),
  'efficientnet_b1': Network(7_794_184, 69, 1, '0.687', SMALL, 240),
  'efficientnet_b2': Network(9_109_994, 69, 1, '1.088', SMALL, 288),
  'efficientnet_b3': Network(12_233_232, 78, 1, '1.827', SMALL, 300),
  'efficientnet_b4': Network(19_341_616, 96, 1, '4.394', SMALL, 380),
  'deit_tiny': Network(5_717_416, 1, 49, '1.254', SMALL_DEIT),
  'deit_small': Network(22_050_664, 1, 49, '4.599', SMALL_DEIT),
  'deit_base': Network(86_567_656, 1, 49, '17.564', SMALL_DEIT),
}
all_networks = pytest.mark.parametrize('name', NETWORKS)
# One of those that differ in their numbers of blocks and channels alone.
each_family = pytest.mark.parametrize(
  'name',
  ['resnet18', 'resnet50', 'mobilenet_v2', 'inception_v3', 'efficientnet_b0',
   'deit_tiny'],
)  # fmt: skip


def image(size=224, channels=3, batch=1):
  return jax.ShapeDtypeStruct((batch, size, size, channels), jnp.float32)


def init_shapes(model, images):
  """Returns the shapes of a network's variables."""
  init = functools.partial(model.init, train=False)
  return jax.eval_shape(init, jax.random.key(0), images)


def count(tree):
  return sum(leaf.size for leaf in jax.tree.leaves(tree))


@functools.cache
def params_of(name):
  images = image(NETWORKS[name].image_size)
  return init_shapes(models.create_model(name, 1000), images)['params']


@functools.cache
def layers_of(name, size=None, **options):
  model = models.create_model(name, 1000, **options)
  images = image(size or NETWORKS[name].image_size)
  return discovery.discover(model, images, train=False)


def small_model(name, **attributes):
  return models.create_model(name, 10, **{**NETWORKS[name].small, **attributes})


def test_every_network_is_tested():
  # The first two are the tests' own; the others take text and have theirs elsewhere.
  others = {'tiny', 'smallest', 'transformer_lm', 'decoder', 'encoder'}
  assert set(NETWORKS) == set(models.MODELS) - others


@all_networks
def test_parameters(name):
  assert count(params_of(name)) == NETWORKS[name].params


@all_networks
def test_layers(name):
  layers = layers_of(name)
  kinds = [layer.kind for layer in layers]
  assert (kinds.count('conv'), kinds.count('dense')) == NETWORKS[name][1:3]
  assert len({layer.path for layer in layers}) == len(layers)
  assert layers[-1].path == 'classifier'


@all_networks
def test_macs(name):
  macs = sum(layer.macs for layer in layers_of(name)) + uncounted_macs(name)
  assert f'{macs / 1e9:.3f}' == NETWORKS[name].gmacs


def uncounted_macs(name):
  """The multiply-accumulates of squeeze-excite and of attention's products."""
  kernels = traverse_util.flatten_dict(params_of(name), sep='/')
  squeeze_excite = sum(
    kernel.size
    for path, kernel in kernels.items()
    if 'squeeze_excite' in path and path.endswith('kernel')
  )
  attention = sum(
    2 * tokens * tokens * hidden
    for layer in layers_of(name)
    if layer.path.endswith('attention/out')
    for _, tokens, hidden in [layer.input_shape]
  )
  return squeeze_excite + attention


def test_macs_of_a_transformer():
  # 14² patches of 16² pixels; with the class token 197 see 4 + 8 square matrices.
  tokens, hidden = 196, 768
  expected = tokens * 16 * 16 * 3 * hidden
  expected += 12 * (tokens + 1) * 12 * hidden * hidden
  expected += hidden * 1000
  assert sum(layer.macs for layer in layers_of('deit_base')) == expected


@pytest.mark.parametrize(
  'name, options, format, cost',
  [
    ('resnet18', {'width': 0.5, 'project_first_block': True}, 'e4m3', '31.13'),
    ('resnet18', {'width': 1.0, 'project_first_block': True}, 'e4m3', '116.9'),
    ('resnet18', {'width': 2.0, 'project_first_block': True}, 'e4m3', '452.5'),
    ('mobilenet_v2', {}, 'e2m1', '4.81'),
    ('mobilenet_v2', {}, 'e4m3', '19.25'),
    ('mobilenet_v2', {}, 'bf16', '77'),
  ],
)
def test_published_costs(name, options, format, cost):
  bops = cost_models.get_cost_model('bops')
  decimals = len(cost.partition('.')[2])
  uniform = bops.uniform(layers_of(name, **options), format)
  assert f'{uniform:.{decimals}f}' == cost


# GBOPs in E4M3 by width, those of the Pareto figures of FLIQS.
PUBLISHED = {
  'resnet18': {
    0.5: 31.13, 0.75: 67.19, 1.0: 116.9, 1.25: 180.3, 1.5: 257.4, 2.0: 452.5
  },
  'resnet50': {
    0.5: 67.35, 0.75: 148.7, 1.0: 261.7, 1.25: 406.5, 1.5: 583.1, 2.0: 1031
  },
  'mobilenet_v2': {0.25: 2.38, 0.5: 6.21, 1.0: 19.25, 1.4: 37.2},
  'inception_v3': {0.25: 12.17, 0.5: 48.28, 0.75: 108.3, 1.0: 192.3, 1.5: 432},
  'efficientnet_b0': {1.0: 24.65},
  'efficientnet_b1': {1.0: 43.89},
  'efficientnet_b2': {1.0: 63.5},
  'efficientnet_b3': {1.0: 116.8},
  'efficientnet_b4': {1.0: 281},
  'deit_base': {0.375: 153.5, 0.5: 271.5, 0.75: 608.1, 0.875: 826.6, 1.0: 1079},
}  # fmt: skip


@pytest.mark.parametrize('name', PUBLISHED)
def test_published_costs_of_every_width(name):
  size = {'efficientnet_b2': 260, 'inception_v3': 224}.get(name)
  options = {'project_first_block': True} if name == 'resnet18' else {}
  bops = cost_models.get_cost_model('bops')
  for width, cost in PUBLISHED[name].items():
    uniform = bops.uniform(layers_of(name, size, width=width, **options), 'e4m3')
    if name == 'inception_v3':  # whatever was counted there, by one factor everywhere
      uniform *= 1.0587
    assert uniform == pytest.approx(cost, rel=3e-3)


@all_networks
def test_float_network_has_the_same_parameters(name):
  model = models.create_model(name, 1000, quantized=False)
  variables = init_shapes(model, image(NETWORKS[name].image_size))
  assert 'quant_stats' not in variables
  assert variables['params'] == params_of(name)


@each_family
def test_output(name):
  model, images = small_model(name, dtype=jnp.bfloat16), image(8, 1, batch=2)
  variables = init_shapes(model, images)
  assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype('float32')}
  evaluate = functools.partial(model.apply, train=False)
  logits = jax.eval_shape(evaluate, variables, images)
  assert logits == jax.ShapeDtypeStruct((2, 10), jnp.float32)
  train = functools.partial(
    model.apply, train=True, mutable=['batch_stats', 'quant_stats']
  )
  rngs = {'dropout': jax.random.key(0)}
  logits, stats = jax.eval_shape(train, variables, images, rngs=rngs)
  assert logits == jax.ShapeDtypeStruct((2, 10), jnp.float32)
  assert {**variables, **stats} == variables


@each_family
def test_computes_in_its_dtype(name):
  model = small_model(name, dtype=jnp.bfloat16, quantized=False)
  images = image(8, 1)
  jaxpr = jax.make_jaxpr(functools.partial(model.apply, train=False))(
    init_shapes(model, images), images
  )
  products = [
    equation.outvars[0].aval.dtype
    for equation in jaxpr.eqns
    if equation.primitive.name in ('conv_general_dilated', 'dot_general')
  ]
  assert set(products) == {jnp.dtype('bfloat16')}


@each_family
def test_width(name):
  half, whole = layers_of(name, width=0.5), layers_of(name)
  assert [layer.path for layer in half] == [layer.path for layer in whole]
  for narrow, wide in zip(half[:-1], whole[:-1]):
    # Not below 8 channels, and in MobileNetV2 1280 at the end.
    assert narrow.output_shape[-1] <= wide.output_shape[-1]
  ratio = sum(layer.macs for layer in half) / sum(layer.macs for layer in whole)
  assert 0.2 < ratio < 0.45


@each_family
def test_small_images_keep_some_extent(name):
  layers = discovery.discover(small_model(name), image(8, 1), train=False)
  convs = [layer for layer in layers if layer.kind == 'conv']
  assert convs[0].output_shape[1] >= 4
  assert convs[-1].output_shape[1] >= 1
  assert len(layers) == sum(NETWORKS[name][1:3])


@pytest.mark.parametrize(
  'name', ['mobilenet_v2', 'inception_v3', 'efficientnet_b0', 'deit_tiny']
)
def test_small_images_are_told_apart(name):
  model = small_model(name, quantized=False)
  variables = random_variables(model, image(8, 1))
  images = jax.random.normal(jax.random.key(1), (4, 8, 8, 1))
  logits = jax.jit(functools.partial(model.apply, train=False))(variables, images)
  assert np.isfinite(logits).all()
  assert np.ptp(logits, axis=0).min() > 0


@pytest.mark.parametrize(
  'channels, expected',
  [(1, 8), (8, 8), (11.9, 16), (12, 16), (19, 24), (36, 40), (44.8, 48), (56, 56)],
)
def test_make_divisible(channels, expected):
  # 11.9 would become 8, and 19 16, each more than a tenth less.
  assert make_divisible(channels) == expected


def test_auxiliary_head():
  model = models.create_model('inception_v3', 1000, aux_head=True)
  images = image(299)
  variables = init_shapes(model, images)
  assert count(variables['params']) == 27_161_264
  # What evaluation does not compute has no cost.
  assert discovery.discover(model, images, train=False) == layers_of('inception_v3')
  train = functools.partial(
    model.apply, train=True, mutable=['batch_stats', 'quant_stats', 'intermediates']
  )
  _, updated = jax.eval_shape(
    train, variables, images, rngs={'dropout': jax.random.key(0)}
  )
  (logits,) = updated['intermediates']['aux_logits']
  assert logits == jax.ShapeDtypeStruct((1, 1000), jnp.float32)


@pytest.mark.parametrize('size, small_images', [(8, True), (75, False), (224, False)])
def test_auxiliary_head_takes_other_sizes(size, small_images):
  model = models.create_model(
    'inception_v3', 10, width=0.125, aux_head=True, small_images=small_images
  )
  params = init_shapes(model, image(size))['params']
  assert params['aux_head']['classifier']['kernel'].shape == (96, 10)


@pytest.mark.parametrize(
  'name, options, size, words',
  [
    ('deit_base', {'width': 0.3}, 224, ('230', '12 heads')),
    ('deit_tiny', {}, 100, ('100×100', 'patch_size=16')),
    ('inception_v3', {}, 74, ('74×74', '75', 'small_images')),
  ],
)
def test_what_does_not_fit_is_named(name, options, size, words):
  with pytest.raises(ValueError) as error:
    layers_of(name, size, **options)
  for word in words:
    assert word in str(error.value)


def test_deit_keeps_its_heads():
  attention = layers_of('deit_base', width=0.375)[1]
  assert attention.path == 'block1/attention/qkv'
  assert attention.kernel_shape == (288, 3 * 288)


# Forward equality with PyTorch: the same structure, from its layers, under our names.


def torch_resnet50(torch):
  nn = torch.nn

  class Bottleneck(nn.Module):
    def __init__(self, inputs, filters, stride):
      super().__init__()
      self.conv1 = nn.Conv2d(inputs, filters, 1, bias=False)
      self.bn1 = nn.BatchNorm2d(filters)
      self.conv2 = nn.Conv2d(filters, filters, 3, stride, 1, bias=False)
      self.bn2 = nn.BatchNorm2d(filters)
      self.conv3 = nn.Conv2d(filters, 4 * filters, 1, bias=False)
      self.bn3 = nn.BatchNorm2d(4 * filters)
      if stride != 1 or inputs != 4 * filters:
        self.conv_shortcut = nn.Conv2d(inputs, 4 * filters, 1, stride, bias=False)
        self.bn_shortcut = nn.BatchNorm2d(4 * filters)

    def forward(self, x):
      y = torch.relu(self.bn1(self.conv1(x)))
      y = torch.relu(self.bn2(self.conv2(y)))
      y = self.bn3(self.conv3(y))
      if hasattr(self, 'conv_shortcut'):
        x = self.bn_shortcut(self.conv_shortcut(x))
      return torch.relu(x + y)

  net = nn.Sequential()
  net.add_module('conv_init', nn.Conv2d(3, 64, 7, 2, 3, bias=False))
  net.add_module('bn_init', nn.BatchNorm2d(64))
  net.add_module('relu', nn.ReLU())
  net.add_module('pool', nn.MaxPool2d(3, 2, 1))
  inputs = 64
  for stage, (filters, blocks) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3))):
    for block in range(blocks):
      stride = 2 if stage and not block else 1
      name = f'stage{stage + 1}_block{block + 1}'
      net.add_module(name, Bottleneck(inputs, filters, stride))
      inputs = 4 * filters
  net.add_module('mean', nn.AdaptiveAvgPool2d(1))
  net.add_module('flatten', nn.Flatten())
  net.add_module('classifier', nn.Linear(inputs, 1000))
  return net


def torch_mobilenet_v2(torch):
  nn = torch.nn

  class InvertedResidual(nn.Module):
    def __init__(self, inputs, filters, stride, expansion):
      super().__init__()
      hidden = inputs * expansion
      if expansion > 1:
        self.expand = nn.Conv2d(inputs, hidden, 1, bias=False)
        self.bn_expand = nn.BatchNorm2d(hidden)
      self.depthwise = nn.Conv2d(
        hidden, hidden, 3, stride, 1, groups=hidden, bias=False
      )
      self.bn_depthwise = nn.BatchNorm2d(hidden)
      self.project = nn.Conv2d(hidden, filters, 1, bias=False)
      self.bn_project = nn.BatchNorm2d(filters)
      self.residual = stride == 1 and inputs == filters

    def forward(self, x):
      y, relu6 = x, nn.functional.relu6
      if hasattr(self, 'expand'):
        y = relu6(self.bn_expand(self.expand(y)))
      y = relu6(self.bn_depthwise(self.depthwise(y)))
      y = self.bn_project(self.project(y))
      return x + y if self.residual else y

  # Expansion, filters, blocks and stride: Table 2 of the paper.
  table = (
      (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1),
      (6, 160, 3, 2), (6, 320, 1, 1),
  )  # fmt: skip
  net = nn.Sequential()
  net.add_module('conv_init', nn.Conv2d(3, 32, 3, 2, 1, bias=False))
  net.add_module('bn_init', nn.BatchNorm2d(32))
  net.add_module('relu_init', nn.ReLU6())
  inputs = 32
  for stage, (expansion, filters, blocks, first_stride) in enumerate(table):
    for block in range(blocks):
      stride = 1 if block else first_stride
      name = f'stage{stage + 1}_block{block + 1}'
      net.add_module(name, InvertedResidual(inputs, filters, stride, expansion))
      inputs = filters
  net.add_module('conv_last', nn.Conv2d(320, 1280, 1, bias=False))
  net.add_module('bn_last', nn.BatchNorm2d(1280))
  net.add_module('relu_last', nn.ReLU6())
  net.add_module('mean', nn.AdaptiveAvgPool2d(1))
  net.add_module('flatten', nn.Flatten())
  net.add_module('classifier', nn.Linear(1280, 1000))
  return net


def random_variables(model, images):
  """Random variables, so that no scale of batch norm is 0 and no mean is forgotten."""
  rng = np.random.default_rng(0)

  def draw(path, leaf):
    if path[-1] == 'kernel':
      fan_in = np.prod(leaf.shape[:-1])
      value = rng.normal(0, np.sqrt(2 / fan_in), leaf.shape)
    elif path[-1] in ('scale', 'var'):
      value = rng.uniform(0.5, 1.5, leaf.shape)
    else:
      value = rng.normal(0, 0.1, leaf.shape)
    return value.astype(np.float32)

  return traverse_util.path_aware_map(draw, init_shapes(model, images))


def copy_to_torch(torch, variables, net):
  """Copies every variable; none of the other network's parameters may be left."""
  names = {'kernel': 'weight', 'scale': 'weight', 'bias': 'bias',
           'mean': 'running_mean', 'var': 'running_var'}  # fmt: skip
  state = {}
  for (_, *path, leaf), value in traverse_util.flatten_dict(variables).items():
    value = value.transpose({4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}[value.ndim])
    state['.'.join([*path, names[leaf]])] = torch.tensor(np.array(value))
  missing, unexpected = net.load_state_dict(state, strict=False)
  assert not unexpected
  assert all(name.endswith('num_batches_tracked') for name in missing)


@pytest.mark.parametrize(
  'name, torch_network',
  [('resnet50', torch_resnet50), ('mobilenet_v2', torch_mobilenet_v2)],
)
def test_equals_pytorch(name, torch_network):
  torch = pytest.importorskip('torch')
  model = models.create_model(name, 1000, quantized=False)
  variables = random_variables(model, image(64))
  net = torch_network(torch).eval()
  copy_to_torch(torch, variables, net)
  images = np.random.default_rng(1).normal(size=(2, 64, 64, 3)).astype(np.float32)
  logits = jax.jit(functools.partial(model.apply, train=False))(variables, images)
  with torch.no_grad():
    expected = net(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()
  scale = np.abs(expected).max()
  np.testing.assert_allclose(logits / scale, expected / scale, atol=1e-4)
