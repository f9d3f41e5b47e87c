"""Batch normalisation folded into layers: what is, what is not, and what is left."""

from collections import Counter
import functools
import re

from flax import linen as nn
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import onnx
import pytest
from tiny_deployments import both, deploy

from fliqs_jax.errors import ConfigError
from fliqs_jax.exporting import exporter, folding, loading, onnx_file, stablehlo

IMAGES = np.random.default_rng(0).normal(size=(3, 6, 6, 4)).astype(np.float32)


def norm(**kwargs):
  return nn.BatchNorm(use_running_average=True, **kwargs)


class Chain(nn.Module):
  """A convolution without a bias, a depthwise one with it, a dense layer."""

  by_number: bool = False  # of examples, which only one example at a time can tell

  @nn.compact
  def __call__(self, x):
    x = nn.relu(norm()(nn.Conv(6, (3, 3), use_bias=False)(x)))
    x = nn.relu(norm()(nn.Conv(6, (3, 3), feature_group_count=6)(x)))
    x = x.reshape(len(x) if self.by_number else x.shape[0], -1)
    x = nn.relu(norm()(nn.Dense(5)(x)))
    return nn.Dense(3)(x)


class NnxChain(nnx.Module):
  """The same beginning in NNX, whose layers are in `nnx.jit`."""

  def __init__(self):
    rngs = nnx.Rngs(0)
    self.conv = nnx.Conv(4, 6, (3, 3), rngs=rngs)
    self.norm = nnx.BatchNorm(6, rngs=rngs)
    self.out = nnx.Linear(6, 3, rngs=rngs)

  def __call__(self, x):
    normalised = jax.jit(lambda x: nnx.relu(self.norm(self.conv(x))))
    return self.out(jnp.mean(normalised(x), (1, 2)))


class Branches(nn.Module):
  """A layer whose output is read twice, and a norm in which places differ."""

  @nn.compact
  def __call__(self, x):
    y = nn.Conv(4, (3, 3))(x)
    x = nn.Conv(4, (1, 1), name='second')(y + nn.relu(norm()(y)))
    return x * self.param('places', nn.initializers.normal(), (6, 6, 1))


class Flipped(nn.Module):
  """Affine operations that are no batch normalisation, with a negative factor."""

  @nn.compact
  def __call__(self, x):
    shift = self.param('shift', nn.initializers.normal(), (5,))
    return (shift - nn.Dense(5, use_bias=False)(x)) / 3 * -shift


CASES = {
  'chain': (Chain(), 3),
  'mapped': (Chain(by_number=True), 3),
  'nnx': (NnxChain(), 1),
  'branches': (Branches(), 0),
  'flipped': (Flipped(), 1),
}


def written(target, given, folder):
  """Returns what a target reports, its file, and what its loader computes."""
  folder.mkdir()
  report = target.write(given, folder)
  loader = loading.import_loader(loading.LOADERS / target.LOADER)
  found = loader.load(folder / target.FILE)(*given.inputs[0])
  return report, folder / target.FILE, found[0] if target is onnx_file else found


def operations(target, file):
  """Counts the operations of a file."""
  if target is onnx_file:
    return Counter(node.op_type for node in onnx.load(file).graph.node)
  program = jax.export.deserialize(bytearray(file.read_bytes())).mlir_module()
  return Counter(re.findall(r'stablehlo\.(\w+)', program))


MULTIPLY = {
  stablehlo: ('multiply', 'subtract', 'rsqrt'),
  onnx_file: ('Mul', 'Sub', 'Sqrt'),
}


@pytest.mark.parametrize('target', [stablehlo, onnx_file])
@pytest.mark.parametrize('name', CASES)
def test_outputs_stay_and_operations_go(name, target, tmp_path):
  network, count = CASES[name]
  given = deploy(network, IMAGES)
  report, file, expected = written(target, given, tmp_path / 'plain')
  assert report == {}
  given = given._replace(folds_batch_norm=True)
  report, folded_file, found = written(target, given, tmp_path / 'folded')
  assert report == {'folded_batch_norms': count}
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
  before, after = operations(target, file), operations(target, folded_file)
  multiply, subtract, root = MULTIPLY[target]
  if name in ('chain', 'nnx'):
    assert before[multiply] - after[multiply] >= count
    assert before[subtract] - after[subtract] == count
    assert after[root] == 0
  if count == 0:
    assert [after[n] for n in MULTIPLY[target]] == [before[n] for n in MULTIPLY[target]]


def folded(given):
  """The network with its batch normalisation folded, and how much was."""
  function = functools.partial(given.deployed, compute=folding.marked_layer)
  shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in given.inputs[0]]
  return folding.fold(function, shapes)


@pytest.mark.parametrize('name', ['int4', 'e4m3', 'e2m3', 'mxfp8_e4m3'])
def test_other_arithmetic(name):
  x = np.random.default_rng(1).normal(size=(2, 32)).astype(np.float32)
  given = deploy(Flipped(), x, formats=both(name))
  function, count = folded(given)
  assert count == 1
  expected = jax.jit(given.deployed)(x)
  np.testing.assert_allclose(jax.jit(function)(x), expected, rtol=2e-5, atol=2e-5)


def test_weights_without_scales_stay():
  assert folded(deploy(Chain(), IMAGES, formats=both('bf16')))[1] == 0


def test_targets_without_a_network_refuse(tmp_path):
  with pytest.raises(ConfigError, match='qwix holds no network.* stablehlo or onnx'):
    exporter.check('qwix', tmp_path / 'export', fold_batch_norm=True)
