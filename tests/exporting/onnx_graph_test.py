"""Operations and networks in ONNX Runtime, against JAX."""

import functools
import itertools

from flax import linen as nn
from flax import nnx
import jax
from jax import lax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
import numpy as np
import onnx
import pytest
from tiny_deployments import Nested, Stacked, both, deploy

from fliqs_jax.errors import ConfigError
from fliqs_jax.exporting import deployment, loading, onnx_file
from fliqs_jax.exporting.onnx_graph import (
  conversion,
  elementwise,
  indexing,
  products,
  reductions,
  shapes,
)
from fliqs_jax.models import decoder, deit, efficientnet, encoder, inception_v3

RULES = {
  name
  for module in (elementwise, indexing, products, reductions, shapes)
  for name in module.RULES
}

X = np.random.default_rng(0).normal(size=(3, 4, 6)).astype(np.float32)
IMAGES = np.random.default_rng(1).normal(size=(3, 8, 8, 4)).astype(np.float32)
NUMBERS = np.array([[3, -2, 7, 0], [1, 5, -6, 4], [2, 2, 9, -1]], np.int32)
KERNEL = np.random.default_rng(2).normal(size=(3, 3, 4, 2)).astype(np.float32)
convolve = functools.partial(
  lax.conv_general_dilated, dimension_numbers=('NHWC', 'HWIO', 'NHWC')
)


def pooled(x, init, function, window=2, **kwargs):
  window = (1, window, window, 1)
  return lax.reduce_window(x, init, function, window, (1, 2, 1, 1), **kwargs)


def place(x):
  """One index for all examples, which depends on them."""
  return jnp.argmax(jnp.sum(x, (0, 2)))


# Functions of one input, in which the rules are.
FUNCTIONS = {
  'arithmetic': lambda x: (x + 1) * 2 - x / 3 + x**3 + jnp.square(-x) + jnp.copy(x),
  'powers': lambda x: (
    jnp.abs(x) ** x + jnp.cbrt(x) + jnp.sqrt(x * x) + lax.rsqrt(x * x + 1)
  ),
  'exponentials': lambda x: jnp.exp(x) + jnp.exp2(x) + jnp.expm1(x / 9) + jnp.expm1(x),
  'logarithms': lambda x: jnp.log(x * x) + jnp.log1p(x * x) + jnp.log1p(x * 1e-6),
  'small numbers': lambda x: 1e6 * (jnp.log1p(x * 1e-6) + jnp.expm1(x * 1e-6)),
  'trigonometry': lambda x: jnp.sin(x) + jnp.cos(x) + jnp.tan(x) + jnp.arctan(x),
  'hyperbolic': lambda x: jnp.sinh(x) + jnp.cosh(x) + jnp.tanh(x) + jnp.arcsinh(x),
  'inverse': lambda x: (
    jnp.arcsin(jnp.tanh(x) / 2)
    + jnp.arccos(jnp.tanh(x) / 2)
    + jnp.arctanh(jnp.tanh(x) / 2)
    + jnp.arccosh(1 + x * x)
  ),
  'sigmoids': lambda x: nn.sigmoid(x) + lax.erf(x) + lax.erfc(x) + nn.gelu(x),
  'activations': lambda x: nn.softplus(x) + nn.elu(x) + nn.selu(x) + nn.hard_swish(x),
  'rounding': lambda x: jnp.floor(x) + jnp.ceil(2 * x) + jnp.round(3 * x) + jnp.sign(x),
  'rounding away from zero': lambda x: lax.round(jnp.round(4 * x) / 2),
  'remainders': lambda x: lax.rem(x, jnp.float32(0.7)) + lax.rem(-x, jnp.float32(0.7)),
  'extremes': lambda x: jnp.maximum(x, 0) + jnp.minimum(x, 1) + lax.clamp(-1.0, x, 2.0),
  'comparisons': lambda x: jnp.stack(
    [x < 0, x <= 0, x > 0, x >= 0, x == 0, x != x[..., :1]]
  ).astype(jnp.int32),
  'logic': lambda x: ~((x < 0) & (x > -1) | (x > 1) ^ (x < 2)),
  'choices': lambda x: jnp.where(x > 0, x, jnp.isfinite(1 / x).astype(jnp.float32)),
  'types': lambda x: lax.stop_gradient((10 * x).astype(jnp.int32)).astype(jnp.float32),
  'precision': lambda x: jnp.round(lax.reduce_precision(x, 8, 7), 1),
  'shapes': lambda x: jnp.squeeze(x.reshape(-1, 2, 1, 12).swapaxes(1, 3), 2)[..., None],
  'parts': lambda x: jnp.concatenate([x[:, 1:], x[:, :1], x[:, ::2, ::-1]], axis=1),
  'pieces': lambda x: jnp.split(x, [1, 3], axis=1)[1] + jnp.flip(x, (1, 2))[:, :2],
  'padding': lambda x: lax.pad(x, jnp.float32(2), [(0, 0, 0), (1, -1, 2), (0, 2, 1)]),
  'part at a place': lambda x: lax.dynamic_slice_in_dim(x, place(x), 2, axis=1),
  'window at places': lambda x: jnp.asarray(X)[:, jnp.argmax(x, 1), 1:4],
  'copies': lambda x: (
    checkpoint_name(jnp.tile(x, (1, 2, 1)), 'x') + jnp.repeat(x, 2, 1)
  ),
  'stacks': lambda x: lax.optimization_barrier(
    jnp.stack(jnp.unstack(x, axis=1)[::-1], axis=2)
  ),
  'numbers along an axis': lambda x: x * lax.broadcasted_iota(jnp.float32, x.shape, 1),
  'sums': lambda x: jnp.sum(x, 1) + jnp.prod(x, 1) + jnp.max(x, 1) + jnp.min(x, 1),
  'places': lambda x: jnp.argmax(x, 1) - jnp.argmin(x, -1)[:, :1],
  'truths': lambda x: jnp.any(x > 1, 1) ^ jnp.all(x < 1, 1),
  'running sums': lambda x: jnp.cumsum(x, 1) + lax.cumsum(x, 2, reverse=True),
  'largest': lambda x: lax.top_k(x, 2),
  'order': lambda x: (jnp.sort(x, 1), jnp.argsort(x, 1)),
  'products': lambda x: jnp.einsum('btd,bsd->bts', x, x) @ np.eye(4, 3) + x[..., :3],
  'rows': lambda x: jnp.take(X[0], jnp.argmax(x, 1), axis=0, mode='clip'),
  'columns': lambda x: jnp.take(X[0], jnp.argmax(x, 2), axis=1, mode='clip'),
  'own rows': lambda x: jax.vmap(lambda a: a[jnp.argmax(a, 0)])(x),
  'elements': lambda x: jnp.asarray(X)[1, jnp.argmax(x, 1), jnp.argmin(x, 1)],
  'rows or nothing': lambda x: (
    jnp.asarray(x).at[:, place(x) + np.array([0, 2])].get(mode='fill', fill_value=-1.0)
  ),
  'a row or nothing': lambda x: (
    jnp.asarray(x).at[:, place(x) + 9].get(mode='fill', fill_value=-1.0)
  ),
  'rows that are replaced': lambda x: jnp.asarray(x).at[:, 1:3].set(x[:, 2:]),
  'own rows or nothing': lambda x: jax.vmap(
    lambda a: a.at[jnp.argmax(a, 0) * 2].get(mode='fill', fill_value=0.0)
  )(x),
  'rows that are set': lambda x: jax.vmap(
    lambda a: jnp.zeros((5, 6)).at[jnp.arange(4) * 2].set(a, mode='drop')
  )(x),
  'rows that are added': lambda x: jax.vmap(
    lambda a: jnp.zeros((4, 3)).at[:, jnp.argmax(a, 0) % 3].add(a)
  )(x),
  'a row that is set': lambda x: lax.dynamic_update_slice_in_dim(
    x, x[:, :1] * 2, place(x), axis=1
  ),
  'a scan': lambda x: lax.scan(
    lambda c, a: (c * a, c + a), x[:, 0], jnp.moveaxis(x, 1, 0), reverse=True
  ),
  'a known branch': lambda x: lax.cond(np.float32(1) > 0, jnp.sin, jnp.cos, x),
}
IMAGE_FUNCTIONS = {
  'convolution': lambda x: convolve(x, KERNEL, (2, 1), 'SAME'),
  'dilated': lambda x: convolve(x, KERNEL, (1, 1), 'VALID', rhs_dilation=(2, 1)),
  'transposed': lambda x: lax.conv_transpose(x, KERNEL, (2, 3), 'SAME'),
  'depthwise': lambda x: convolve(
    x, KERNEL[:, :, :1].repeat(2, -1), (1, 1), 'SAME', feature_group_count=4
  ),
  'pooling': lambda x: (
    pooled(x, -jnp.inf, lax.max, padding='SAME')
    + nn.avg_pool(x, (3, 3), (2, 1), 'SAME')
  ),
  'dilated pooling': lambda x: pooled(
    x, 0.0, lax.add, padding='VALID', window_dilation=(1, 2, 1, 1)
  ),
  'resizing': lambda x: jax.image.resize(x, (len(X), 4, 12, 4), 'linear'),
}
CASES = {
  **{name: (function, X) for name, function in FUNCTIONS.items()},
  **{name: (function, IMAGES) for name, function in IMAGE_FUNCTIONS.items()},
  'whole numbers': (
    lambda n: jnp.stack([n // 3, n % 3, n & 5, n | 8, n ^ 3, ~n, lax.rem(n, 3), -n]),
    NUMBERS,
  ),
}


def run_onnx(model, *inputs):
  """Runs a model with the loader of exports."""
  loader = loading.import_loader(loading.LOADERS / onnx_file.LOADER)
  return loader.load(model.SerializeToString())(*inputs)


@pytest.mark.parametrize('name', CASES)
def test_operations(name):
  function, x = CASES[name]
  given = (jax.ShapeDtypeStruct(x.shape, x.dtype),)
  if name != 'resizing':  # which takes the size of the batch as a number
    given = deployment.symbolic_shapes((x,))
  expected = jax.tree.leaves(function(x))
  found = run_onnx(conversion.make_model(function, given, {}), x)
  for a, b in zip(found, expected, strict=True):
    assert a.dtype == b.dtype and a.shape == b.shape
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_negative_padding_of_a_convolution():
  # JAX itself computes it wrongly on CPUs when it does not optimise.
  function = lambda x: convolve(x, KERNEL, (1, 1), ((-1, 1), (0, -2)))
  model = conversion.make_model(function, deployment.symbolic_shapes((IMAGES,)), {})
  expected = convolve(IMAGES[:, 1:, :-2], KERNEL, (1, 1), ((0, 1), (0, 0)))
  np.testing.assert_allclose(run_onnx(model, IMAGES)[0], expected, atol=1e-5)


def primitives(jaxpr):
  """The names of the primitives in a jaxpr."""
  for equation in jaxpr.eqns:
    yield equation.primitive.name
    for value in equation.params.values():
      inner = getattr(value, 'jaxpr', value)
      if hasattr(inner, 'eqns'):
        yield from primitives(inner)


def test_every_rule_is_tested():
  found = set(
    itertools.chain.from_iterable(
      primitives(jax.make_jaxpr(function)(x).jaxpr) for function, x in CASES.values()
    )
  )
  assert RULES - found == set()


@pytest.mark.parametrize(
  'function, message',
  [
    (lambda x: jnp.fft.fft(x).real, "computes 'fft'"),
    (lambda x: lax.while_loop(lambda a: a.sum() < 9, lambda a: a + 1, x), "'while'"),
    (lambda x: lax.cond(jnp.sum(x) > 0, jnp.sin, jnp.cos, x), "'cond'"),
    (lambda x: jnp.maximum(x > 0, x > 1), 'cannot express the network: .*Max'),
  ],
)
def test_what_has_no_rule_is_named(function, message):
  given = deployment.symbolic_shapes((X,))
  with pytest.raises(ConfigError, match=message):
    conversion.make_model(function, given, {})


class Multilayer(nnx.Module):
  """A perceptron that asks for the size of its batch."""

  def __init__(self):
    rngs = nnx.Rngs(0)
    self.hidden = nnx.Linear(24, 8, rngs=rngs)
    self.out = nnx.Linear(8, 3, rngs=rngs)

  def __call__(self, x):
    return self.out(nnx.relu(self.hidden(x.reshape(len(x), -1))))


class Convolutional(nnx.Module):
  """Convolutions, one of them transposed, batch normalisation and dropout."""

  def __init__(self):
    rngs = nnx.Rngs(0)
    self.conv = nnx.Conv(4, 6, (3, 3), strides=2, rngs=rngs)
    self.norm = nnx.BatchNorm(6, rngs=rngs)
    self.wider = nnx.ConvTranspose(6, 2, (3, 3), strides=(2, 2), rngs=rngs)
    self.dropout = nnx.Dropout(0.5, rngs=rngs)
    self.out = nnx.LinearGeneral((8, 2), (3, 2), axis=(1, 3), rngs=rngs)

  def __call__(self, x):
    x = nnx.relu(self.norm(self.conv(x)))
    return self.out(self.dropout(nnx.max_pool(self.wider(x), (1, 2), (1, 2))))


class Attention(nnx.Module):
  """Flax's own attention, and an `Einsum` of two kept axes."""

  def __init__(self):
    rngs = nnx.Rngs(0)
    self.attention = nnx.MultiHeadAttention(2, 6, decode=False, rngs=rngs)
    self.heads = nnx.Einsum('btd,kdh->kbth', (2, 6, 4), rngs=rngs)
    self.out = nnx.Einsum('kbth,khd->btd', (2, 4, 5), rngs=rngs)

  def __call__(self, x):
    return self.out(self.heads(self.attention(x, mask=nnx.make_causal_mask(x[..., 0]))))


class PartOfInception(nn.Module):
  """A block of each kind, but those that are larger and compute nothing else."""

  @nn.compact
  def __call__(self, x, train):
    norm = functools.partial(nn.BatchNorm, use_running_average=not train)
    conv_norm = functools.partial(inception_v3.ConvNorm, width=0.02, norm=norm)
    x = inception_v3.InceptionA(32, conv_norm)(x)
    return jnp.mean(inception_v3.ReductionB('VALID', conv_norm)(x), (1, 2))


TOKENS = np.random.default_rng(3).integers(0, 20, (3, 6))
MASK = np.arange(6) < np.array([[6], [4], [0]])
DECODER = functools.partial(
  decoder.Decoder, vocabulary_size=20, hidden_size=16, depth=1, num_heads=4,
  num_kv_heads=2, head_size=6, mlp_size=8, tied=False,
)  # fmt: skip
ENCODER = functools.partial(
  encoder.Encoder, vocabulary_size=20, hidden_size=16, depth=1, num_heads=4, mlp_size=8,
  max_tokens=8,
)  # fmt: skip
EVAL = {'train': False}

# What makes a network, its inputs and its other arguments.
NETWORKS = {
  'perceptron': (Multilayer, (X,), {}),
  'convolutional': (Convolutional, (IMAGES,), {}),
  'attention': (Attention, (X,), {}),
  'stacked': (lambda: Stacked(nnx.Rngs(0)), (X,), {}),
  'nested': (lambda: Nested(nnx.Rngs(0)), (X,), {}),
  'recurrent': (lambda: nn.RNN(nn.GRUCell(5)), (X,), {}),
  'encoder': (
    lambda: encoder.SentenceEncoder(ENCODER(rngs=nnx.Rngs(0))), (TOKENS, MASK), {}
  ),
  'decoder': (lambda: DECODER(rngs=nnx.Rngs(0)), (TOKENS,), {}),
  'experts': (lambda: DECODER(num_experts=4, rngs=nnx.Rngs(0)), (TOKENS,), {}),
  'deit': (lambda: deit.DeiT(8, 2, 5, patch_size=4, depth=1), (IMAGES,), EVAL),
  'efficientnet': (
    lambda: efficientnet.EfficientNet(1, 0.5, 0.1, 5, 0.25, True), (IMAGES,), EVAL
  ),
  'inception': (PartOfInception, (IMAGES,), EVAL),
}  # fmt: skip


@pytest.mark.parametrize('name', ['int8', 'int4', 'e4m3'])
def test_scales_of_tokens(name, tmp_path):
  x = X * np.arange(4, dtype=np.float32)[:, None]  # of one token it is zero
  given = deploy(nn.Dense(3), x, formats=both(name), shared_scale='token')
  onnx_file.write(given, tmp_path)
  (found,) = run_onnx(onnx.load(tmp_path / onnx_file.FILE), x)
  np.testing.assert_allclose(found, given.searched(x), rtol=1e-5, atol=1e-5)


@pytest.fixture
def one_stage(monkeypatch):
  """Lets an EfficientNet have one stage, with an expansion and a skip."""
  stage = efficientnet.Stage(2, 3, 16, 4, 2)
  monkeypatch.setattr(efficientnet, 'STAGES', (stage,))


@pytest.mark.parametrize('name', NETWORKS)
def test_networks(name, one_stage, tmp_path):
  make, inputs, kwargs = NETWORKS[name]
  given = deploy(make(), *inputs, kwargs=kwargs)
  assert not any(map(onnx_file.refused, given.layers.values()))
  onnx_file.write(given, tmp_path)
  model = onnx.load(tmp_path / onnx_file.FILE)
  kinds = [node.op_type for node in model.graph.node]
  calls = sum(layer.layer.calls for layer in given.layers.values())
  kernels = sum(layer.layer.kernels for layer in given.layers.values())
  assert kinds.count('QuantizeLinear') == calls
  assert kinds.count('DequantizeLinear') == calls + kernels
  (found,) = run_onnx(model, *inputs)
  expected = jax.jit(given.searched)(*inputs)
  size = float(jnp.max(jnp.abs(expected)))
  assert size > 0
  np.testing.assert_allclose(found, expected, atol=1e-5 * size)
