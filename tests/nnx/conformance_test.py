"""The same networks in NNX and in linen: layers, outputs and searches, bit for bit."""

import copy
import functools
import pickle
import re

from flax import linen as nn
from flax import nnx
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import qwix

import fliqs_jax
from fliqs_jax.errors import ConfigError
from fliqs_jax.layers.layer import BoundLayer
from fliqs_jax.layers.variables import FORMATS, QUANT_STATS, nest
from fliqs_jax.numerics.formats import get_format
from fliqs_jax.numerics.products import LayerFormats
from fliqs_jax.runs import evaluation, loop
from fliqs_jax.training import sharding
from fliqs_jax.training.train_state import Arguments, create_train_state, plain


class LinenNet(nn.Module):
  @nn.compact
  def __call__(self, image, train):
    x = nn.Conv(4, (3, 3), name='conv')(image)
    x = nn.BatchNorm(use_running_average=not train, name='norm')(x)
    return nn.Dense(3, name='dense')(nn.relu(x).mean((1, 2)))


class NnxNet(nnx.Module):
  def __init__(self, rngs):
    self.conv = nnx.Conv(2, 4, (3, 3), rngs=rngs)
    self.norm = nnx.BatchNorm(4, rngs=rngs)
    self.dense = nnx.Linear(4, 3, rngs=rngs)

  def __call__(self, image):
    return self.dense(nnx.relu(self.norm(self.conv(image))).mean((1, 2)))


class LinenLayers(nn.Module):
  """Layers of the other kinds."""

  @nn.compact
  def __call__(self, x):
    x = nn.ConvTranspose(4, (3,), strides=(2,), name='up')(x)
    x = nn.DenseGeneral((2, 3), name='heads')(x)
    x = nn.Einsum((2, 3, 4), 'blhd,hdo->blo', name='out')(x)
    shared = nn.Dense(4, name='shared')
    x = shared(nn.relu(shared(x)))
    scan = nn.scan(
      LinenBlock, variable_axes={True: 0}, split_rngs={'params': True}, length=3
    )
    return scan(name='scan')(x, None)[0]


class LinenBlock(nn.Module):
  @nn.compact
  def __call__(self, x, _):
    return x + nn.Dense(4, name='dense')(nn.relu(x)), None


class NnxBlock(nnx.Module):
  def __init__(self, rngs):
    self.dense = nnx.Linear(4, 4, rngs=rngs)

  def __call__(self, x):
    return x + self.dense(nnx.relu(x))


class NnxLayers(nnx.Module):
  def __init__(self, rngs):
    self.up = nnx.ConvTranspose(2, 4, (3,), strides=(2,), rngs=rngs)
    self.heads = nnx.LinearGeneral(4, (2, 3), rngs=rngs)
    self.out = nnx.Einsum('blhd,hdo->blo', (2, 3, 4), (4,), rngs=rngs)
    self.shared = nnx.Linear(4, 4, rngs=rngs)
    make = nnx.vmap(lambda key: NnxBlock(nnx.Rngs(key)))
    self.scan = make(jax.random.split(jax.random.key(1), 3))

  def __call__(self, x):
    x = self.out(self.heads(self.up(x)))
    x = self.shared(nnx.relu(self.shared(x)))
    step = lambda x, block: block(x)
    return nnx.scan(step, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.scan)


class LinenProjection(nn.Module):
  """A projection without a layer of Flax, as that of the widespread Flax GPT-2."""

  features: int

  @nn.compact
  def __call__(self, x):
    kernel = self.param('kernel', nn.initializers.ones, (self.features, x.shape[-1]))
    return lax.dot_general(x, kernel.T, (((x.ndim - 1,), (0,)), ((), ())))


class LinenProducts(nn.Module):
  """Products of parameters by themselves, between and around layers of Flax."""

  @nn.compact
  def __call__(self, tokens):
    param = functools.partial(self.param, init_fn=nn.initializers.ones)
    embed = nn.Embed(7, 4, name='embed')
    x = nn.Dense(4, name='dense')(embed(tokens))
    x = nn.relu(LinenProjection(6, name='c_fc')(x))
    x = jnp.einsum('btd,dnh->btnh', x, param('heads', shape=(6, 2, 3)))
    x = x.reshape(*tokens.shape, 6) @ param('out', shape=(6, 4))
    x = lax.conv_general_dilated(
      x, param('conv', shape=(3, 4, 4)), (1,), 'SAME',
      dimension_numbers=('NWC', 'WIO', 'NWC'),
    )  # fmt: skip
    stacked = param('stacked', shape=(3, 4, 4))
    x, _ = lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, stacked)
    x = jax.checkpoint(jnp.matmul)(x, param('again', shape=(4, 4)))
    return embed.attend(x)


class NnxProjection(nnx.Module):
  def __init__(self, inputs, features):
    self.kernel = nnx.Param(jnp.ones((features, inputs)))

  def __call__(self, x):
    return lax.dot_general(x, self.kernel[...].T, (((x.ndim - 1,), (0,)), ((), ())))


class NnxProducts(nnx.Module):
  def __init__(self, rngs):
    normal = lambda *shape: nnx.Param(rngs.params.normal(shape))
    self.embed = nnx.Embed(7, 4, rngs=rngs)
    self.dense = nnx.Linear(4, 4, rngs=rngs)
    self.c_fc = NnxProjection(4, 6)
    self.heads, self.out = normal(6, 2, 3), normal(6, 4)
    self.conv, self.stacked = normal(3, 4, 4), normal(3, 4, 4)
    self.again = normal(4, 4)

  def __call__(self, tokens):
    x = nnx.relu(self.c_fc(self.dense(self.embed(tokens))))
    x = jnp.einsum('btd,dnh->btnh', x, self.heads[...])
    x = x.reshape(*tokens.shape, 6) @ self.out
    x = lax.conv_general_dilated(
      x, self.conv[...], (1,), 'SAME', dimension_numbers=('NWC', 'WIO', 'NWC')
    )
    step = lambda x, w: (jnp.tanh(x @ w), None)
    x, _ = lax.scan(step, x, self.stacked[...])
    x = jax.checkpoint(jnp.matmul)(x, self.again[...])
    return self.embed.attend(x)


PAIRS = {
  'convolution': (NnxNet, LinenNet(), (2, 4, 4, 2), {'train': False}),
  'other layers': (NnxLayers, LinenLayers(), (2, 5, 2), {}),
  'bare products': (NnxProducts, LinenProducts(), None, {}),
}


TOKENS = np.random.default_rng(0).integers(7, size=(2, 5))


def _outputs(network, kwargs, x, variables):
  """Returns quantized and plain outputs, and the averages of a call in training."""
  train = {name: not value for name, value in kwargs.items()}
  mutable = ['batch_stats', QUANT_STATS]
  _, updated = network.apply(variables, x, mutable=mutable, **train)
  # The averages of the first call set the thresholds of the second.
  quantized = variables | updated
  plain = {name: quantized[name] for name in variables if name != FORMATS}
  outputs = (network.apply(v, x, **kwargs) for v in (quantized, plain))
  return *outputs, jax.tree.leaves(updated)


@pytest.mark.parametrize('pair', PAIRS)
def test_layers_and_outputs_are_the_same(pair):
  make, linen_model, shape, kwargs = PAIRS[pair]
  x = jax.random.normal(jax.random.key(1), shape) if shape else TOKENS
  model = make(nnx.Rngs(0))
  graph = nnx.graphdef(model)
  ours, theirs = map(fliqs_jax.make_searchable, (model, linen_model))
  found, expected = ours.coverage(x[:1]), theirs.coverage(x[:1], **kwargs)
  neutral = lambda layers: [layer._replace(operator='') for layer in layers]
  assert neutral(found.layers) == neutral(expected.layers)
  assert found.skipped == expected.skipped == {}
  assert found.share == expected.share == 1
  four, params = get_format('int4'), ours.init(None, x)['params']
  bound = {layer.path: BoundLayer(LayerFormats(four, four)) for layer in found.layers}
  results = []
  for network, layers, arguments in (
    (ours, found.layers, {}),
    (theirs, expected.layers, kwargs),
  ):
    variables = network.init(jax.random.key(0), x, **arguments)
    variables |= {'params': params, FORMATS: nest(layers, bound)}
    outputs = functools.partial(_outputs, network, arguments, x)
    results.append(jax.jit(outputs)(variables))
  jax.tree.map(np.testing.assert_array_equal, *results)
  assert np.abs(results[0][0] - results[0][1]).max() > 0
  assert nnx.graphdef(model) == graph  # as it was given


class LinenTied(nn.Module):
  @nn.compact
  def __call__(self, tokens):
    embed = nn.Embed(7, 4, name='embed')
    kernel = self.param('kernel', nn.initializers.ones, (4, 4))
    return embed.attend(embed(tokens) @ kernel)


class NnxTied(nnx.Module):
  """Tied embeddings around a product of a bare parameter."""

  def __init__(self, rngs):
    self.embed = nnx.Embed(7, 4, rngs=rngs)
    self.kernel = nnx.Param(rngs.params.normal((4, 4)))

  def __call__(self, tokens):
    return self.embed.attend(self.embed(tokens) @ self.kernel)


def test_products_of_bare_parameters_are_searched_and_computed_by_the_result():
  model = NnxTied(nnx.Rngs(0))
  network = fliqs_jax.make_searchable(model)
  found = {layer.path: layer.macs for layer in network.coverage(TOKENS[:1]).layers}
  assert found == {'kernel': 5 * 4 * 4, 'embed/embedding': 5 * 4 * 7}
  results = [
    fliqs_jax.search(
      network, [{'x': TOKENS}], [{'x': TOKENS}], inputs='x', variables=variables,
      loss=lambda y, batch: optax.softmax_cross_entropy_with_integer_labels(
        y, batch['x']
      ),
      num_steps=4, num_samples=2, formats='int2,int4', target_format='int4',
    )
    for network, variables in (
      (model, None),
      (LinenTied(), {'params': nnx.to_pure_dict(nnx.state(model, nnx.Param))}),
    )
  ]  # fmt: skip
  for field in ('formats', 'cost', 'eval', 'policy', 'history'):
    assert getattr(results[0], field) == getattr(results[1], field), field
  assert set(results[0].formats) == set(found)
  ours, theirs = results
  expected = theirs.model.apply(theirs.variables, TOKENS)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
  close(jax.jit(lambda x: ours.model(x))(TOKENS), expected)  # closed over
  close(nnx.jit(lambda model, x: model(x))(ours.model, TOKENS), expected)
  assert np.abs(expected - model(TOKENS)).max() > 0.01
  for again in (
    nnx.merge(*nnx.split(ours.model)),
    nnx.clone(ours.model),
    copy.deepcopy(ours.model),
    pickle.loads(pickle.dumps(ours.model)),
  ):
    assert isinstance(again, NnxTied)
    close(again(TOKENS), expected)


class Counting(nnx.Module):
  """A network that changes itself as it is called, and is given modules."""

  def __init__(self, rngs):
    self.kernel = nnx.Param(rngs.params.normal((4, 4)))
    self.norm = nnx.BatchNorm(4, rngs=rngs)
    self.dropout = nnx.Dropout(0.5)
    self.calls = nnx.BatchStat(jnp.zeros(()))

  def __call__(self, x, rngs=None):
    self.calls[...] += 1
    x = self.dropout(self.norm(x @ self.kernel), rngs=rngs)
    self.sow(nnx.Intermediate, 'hidden', x)
    return x


def test_a_call_with_bare_products_changes_the_model_as_its_own_does():
  own, x = Counting(nnx.Rngs(0)), jax.random.normal(jax.random.key(0), (6, 4))
  network = fliqs_jax.make_searchable(own)
  (layer,) = network.coverage(x[:1]).layers
  exact = get_format('float32')
  bound = {layer.path: BoundLayer(LayerFormats(exact, exact))}
  variables = network.init(None, x) | {FORMATS: nest([layer], bound)}
  quantized = network.merge(variables)
  own.train(), quantized.train()
  keys = nnx.Rngs(dropout=1), nnx.Rngs(dropout=1)
  outputs = [model(x, rngs=rngs) for model, rngs in zip((own, quantized), keys)]
  np.testing.assert_allclose(*outputs, rtol=1e-6)
  assert [int(rngs.dropout.count[...]) for rngs in keys] == [1, 1]
  assert float(quantized.quantized_products['kernel']['product'].absmax[...]) > 0
  for kind in (nnx.BatchStat, nnx.Intermediate):
    states = [nnx.to_pure_dict(nnx.state(m, kind)) for m in (own, quantized)]
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), *states)


def batch(seed):
  rng = np.random.default_rng(seed)
  image = rng.normal(size=(8, 4, 4, 2)).astype(np.float32)
  return {'image': image, 'label': rng.integers(3, size=8)}


@pytest.fixture(scope='module')
def searches():
  """Results of the same search over both networks, and the NNX model before it."""
  model = NnxNet(nnx.Rngs(0))
  before = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(model)))
  start = {
    'params': nnx.to_pure_dict(nnx.state(model, nnx.Param)),
    'batch_stats': nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)),
  }
  results = [
    fliqs_jax.search(
      network, [batch(0), batch(1)], [batch(2)], variables=variables, num_steps=12,
      num_samples=2, formats='int2,int4,int8', target_format='int4', log_every=4,
    )
    for network, variables in ((model, None), (LinenNet(), start))
  ]  # fmt: skip
  return *results, model, before


def test_a_search_is_the_same(searches):
  ours, theirs, _, _ = searches
  for field in ('formats', 'cost', 'eval', 'policy', 'history'):
    assert getattr(ours, field) == getattr(theirs, field), field
  for name in ('params', 'batch_stats'):
    jax.tree.map(
      np.testing.assert_array_equal, ours.variables[name], theirs.variables[name]
    )


def test_the_result_is_an_nnx_module_and_the_given_one_stays(searches):
  ours, theirs, model, before = searches
  after = nnx.to_pure_dict(nnx.state(model))
  jax.tree.map(np.testing.assert_array_equal, after, before)
  images = batch(2)['image']
  expected = jax.jit(lambda v: theirs.model.apply(v, images, train=False))
  found = nnx.jit(lambda model: model(images))(ours.model)
  np.testing.assert_allclose(found, expected(theirs.variables), rtol=1e-5, atol=1e-6)
  # Its state can be taken out and put back, as that of any module.
  graph, state = nnx.split(ours.model)
  assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
  again = nnx.merge(graph, jax.tree.map(jnp.asarray, jax.device_get(state)))
  np.testing.assert_allclose(again(images), found, rtol=1e-5, atol=1e-6)


def test_a_result_goes_on_from_its_weights_and_not_from_its_module(searches):
  ours, theirs, model, _ = searches
  state = nnx.state(ours.model, nnx.Param)
  for given in (state, nnx.to_pure_dict(state)):
    jax.tree.map(
      np.testing.assert_array_equal, plain(given), theirs.variables['params']
    )
  with pytest.raises(ConfigError, match='NnxNet has formats already, in .*: expected'):
    fliqs_jax.make_searchable(ours.model)
  shapes = nnx.eval_shape(lambda: NnxNet(nnx.Rngs(0)))
  with pytest.raises(ConfigError, match='of NnxNet has a shape and no values'):
    fliqs_jax.make_searchable(shapes)


def test_a_saved_result_is_evaluated_with_a_new_instance(searches, tmp_path):
  ours = searches[0]
  ours.save(tmp_path / 'saved')
  model = NnxNet(nnx.Rngs(1))  # of other weights
  assert fliqs_jax.evaluate(model, [batch(2)], tmp_path / 'saved') == ours.eval


def test_the_result_is_exported(searches, tmp_path):
  ours = searches[0]
  for target in ('safetensors', 'stablehlo'):
    report = ours.export(target, tmp_path / target)
    assert report['agreement'] == 1.0
    assert report['eval']['loss'] == pytest.approx(ours.eval['loss'], rel=1e-4)
  with pytest.raises(ConfigError):
    ours.export('qwix', tmp_path / 'qwix')


def bytes_of_the_step(result):
  """Bytes that the compiled step of a search moves, as XLA counts them."""
  setup = result._setup
  mesh = sharding.make_mesh(setup.num_samples)
  state = jax.eval_shape(lambda: evaluation.initial_state(setup, mesh, 0))
  given = next(setup.data.train(0, sharding.batch_sharding(mesh)))
  step = loop.make_step(setup, mesh).lower(state, given).compile()
  return step.cost_analysis()['bytes accessed']


def test_the_step_moves_the_same_bytes(searches):
  ours, theirs = map(bytes_of_the_step, searches[:2])
  assert ours == pytest.approx(theirs, rel=0.02)


def test_weights_are_no_constants_of_the_program_that_makes_the_state():
  model = fliqs_jax.make_searchable(NnxNet(nnx.Rngs(0)))
  create = functools.partial(
    create_train_state, model, Arguments((), {}), optax.sgd(0.1), None
  )
  own = model.own_variables(batch(0)['image'])
  program = jax.make_jaxpr(create)(jax.random.key(0), own)
  assert not any(map(np.ndim, program.consts))


# Wrong input


class Lookup(nnx.Module):
  def __init__(self, rngs):
    self.embed = nnx.Embed(5, 3, rngs=rngs)

  def __call__(self, tokens):
    return self.embed(tokens)


class Forgetful(nnx.Module):
  """Networks whose dropout is made without random keys."""

  def __init__(self, rngs):
    self.layers = nnx.List([nnx.Linear(2, 3, rngs=rngs), nnx.Dropout(0.5)])

  def __call__(self, x):
    return self.layers[1](self.layers[0](x.mean((1, 2))))


class LinenReshape(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.Dense(3)(x.reshape(-1, 7))


class LinenOuter(nn.Module):
  @nn.compact
  def __call__(self, x):
    return LinenReshape(name='inner')(x)


def quantized_by_qwix(model):
  provider = qwix.QtProvider([qwix.QuantizationRule(weight_qtype='int8')])
  if isinstance(model, nn.Module):
    return qwix.quantize_model(model, provider)
  return qwix.quantize_model(model, provider, batch(0)['image'], skip_nnx_init=True)


@pytest.mark.parametrize(
  'make, inputs, expected',
  [
    (lambda: NnxNet, 'image', 'found the class NnxNet'),
    (lambda: Lookup(nnx.Rngs(0)), 'label',
     'no layer of Lookup can be searched\nembed: .*parameters are looked up'),
    (lambda: NnxNet(nnx.Rngs(0)), lambda batch: batch['image'][..., :1],
     r'NnxNet called with \(\(8, 4, 4, 1\),\): conv: .*: expected a batch that fits'),
    (LinenOuter, 'image', r'LinenOuter called with .*: inner: .*: expected a batch'),
    (lambda: Forgetful(nnx.Rngs(0)), 'image',
     'layers/1: .*: expected it to be made with rngs, as nnx.Dropout'),
    (lambda: quantized_by_qwix(NnxNet(nnx.Rngs(0))), 'image',
     'NnxNet is quantized already, by qwix: expected the network without it'),
    (lambda: quantized_by_qwix(LinenNet()), 'image',
     'LinenNet is quantized already, by qwix: expected the network without it'),
  ],
)  # fmt: skip
def test_wrong_input_is_named(make, inputs, expected, tmp_path):
  with pytest.raises(ConfigError) as error:
    fliqs_jax.search(
      make(), [batch(0)], [batch(1)], inputs=inputs, workdir=tmp_path / 'run'
    )
  assert re.search(expected, str(error.value)), str(error.value)
  assert not (tmp_path / 'run').exists()
