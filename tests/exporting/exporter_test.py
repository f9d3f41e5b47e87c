"""Exports of a finished run: loaded elsewhere, compared, refused where they must be."""

import errno
import json
import os
import re

from conftest import ROOT
from etils import epath
from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import onnx
import pytest

import fliqs_jax
from fliqs_jax.errors import ConfigError
from fliqs_jax.exporting import deployment, exporter, loading, native, verification
from fliqs_jax.exporting.parameters import quantized_parameters
from fliqs_jax.layers.replacement import replaced_layers
from fliqs_jax.layers.variables import nest
from fliqs_jax.linen.discovery import discover
from fliqs_jax.runs import evaluation
from fliqs_jax.search.cost_models import get_cost_model
from fliqs_jax.search.space import fixed_space

LAYERS = ('conv', 'hidden', 'classifier')  # of the finished run


def test_codes_and_scales_are_those_that_the_layers_compute_with():
  # By hand: absmax of the two channels is 3.5 and 1.75, so that steps of int3 are 3.5/3
  # and 1.75/3, and the input's scale is 4 / 127.
  layers = discover(
    fliqs_jax.make_searchable(nn.Dense(2)), jax.ShapeDtypeStruct((1, 3), jnp.float32)
  )
  kernel = np.array([[3.5, -1.75], [1.0, 0.2], [-2.0, 0.9]], np.float32)
  variables = {
    'params': {'kernel': kernel, 'bias': np.zeros(2, np.float32)},
    'quant_stats': {
      layers[0].operator: {'mean_square': np.float32(1), 'absmax': np.float32(4)}
    },
  }
  assigned = {'': {'weights': 'int3', 'activations': 'int8'}}
  layer = quantized_parameters(layers, variables, assigned, 'absmax')['']
  assert layer.codes.dtype.name == 'int4'
  assert layer.codes.astype(int).tolist() == [[3, -3], [1, 0], [-2, 2]]
  np.testing.assert_allclose(layer.weight_scale, [[3.5 / 3, 1.75 / 3]], rtol=1e-6)
  np.testing.assert_allclose(layer.activation_scale, 4 / 127, rtol=1e-6)


def test_the_docs_build_the_network_of_a_run_again(finished, run):
  text = (ROOT / 'docs' / 'deploy.md').read_text()
  _, text = text.split('## In Python, from the folder of a run')
  code = re.search('```python\n(.*?)```', text, re.S)[1]
  names = {}
  exec(code.replace('runs/digits', str(finished)), names)
  logits, network = names['logits'], names['network']
  assert logits.shape == (len(names['images']), 10)
  labels = network.batches[0]['label']
  assert np.mean(np.argmax(logits, -1) == labels) == pytest.approx(
    run[2]['eval']['accuracy'], abs=0.05
  )


def test_scales_of_floats_are_those_of_their_own_values():
  layers = discover(
    fliqs_jax.make_searchable(nn.Dense(1)), jax.ShapeDtypeStruct((1, 2), jnp.float32)
  )
  variables = {'params': {'kernel': np.array([[0.5], [-0.25]], np.float32)}}
  assigned = {'': {'weights': 'e4m3', 'activations': 'e4m3'}}
  layer = quantized_parameters(layers, variables, assigned, 'absmax')['']
  assert layer.codes.dtype.name == 'float8_e4m3fn'
  assert layer.codes.astype(float).ravel().tolist() == [448, -224]
  np.testing.assert_allclose(layer.weight_scale, [[0.5 / 448]], rtol=1e-6)
  assert layer.activation_scale is None


def one_layer(kind, weights, activations, seed=0):
  """A network of one layer with statistics, and an input for it."""
  shape = (2, 6, 6, 4) if kind == 'conv' else (2, 12)
  network = nn.Conv(5, (3, 3)) if kind == 'conv' else nn.Dense(5)
  x = jax.random.normal(jax.random.key(seed), shape)
  model = fliqs_jax.make_searchable(network)
  variables = model.init(jax.random.key(1), x)
  assigned = {'': {'weights': weights, 'activations': activations}}
  layers = discover(model, x)
  bound = fixed_space(layers, assigned).bind(np.zeros(0, np.int32))
  _, updated = model.apply(variables, x, mutable=['quant_stats'])
  variables = {**variables, **updated}
  quantized = quantized_parameters(layers, variables, assigned)
  expected = model.apply({**variables, 'formats': nest(layers, bound)}, x)
  return model, variables, quantized, x, expected


MIXED = [('int4', 'int8'), ('int8', 'e4m3'), ('e4m3', 'e4m3'), ('bf16', 'bf16')]


@pytest.mark.parametrize('kind', ['conv', 'dense'])
@pytest.mark.parametrize(
  'weights, activations',
  [*((n, n) for n in ('int2', 'int5', 'e2m1', 'e2m3', 'e5m2', 'e7m0')), *MIXED],
)
def test_deployed_layers_compute_what_the_search_does(kind, weights, activations):
  model, variables, quantized, x, expected = one_layer(kind, weights, activations)

  def compute(path, x, w, product):
    return native.deployed_layer(quantized[path], x, product)

  with replaced_layers(compute):
    y = model.apply({'params': variables['params']}, x)
  np.testing.assert_allclose(y, expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize('target', ['safetensors', 'stablehlo', 'onnx'])
def test_every_target_is_loaded_again_and_computes_the_same(target, deployed, exported):
  folder, report = exported(target)
  assert report['examples'] == 360
  assert report['agreement'] >= 0.99
  for name, mean in deployed.result['eval'].items():
    if name != 'num_examples':
      assert report['eval'][name] == pytest.approx(mean, rel=0.01), name
  assert report == json.loads((folder / 'report.json').read_text())
  assert (folder / report['file']).is_file()


def test_packed_weights_are_as_small_as_the_cost_model_says(deployed, exported):
  folder, report = exported('safetensors')
  layers = tuple(layer.layer for layer in deployed.layers.values())
  space = fixed_space(layers, deployed.result['formats'])
  expected = get_cost_model('model_size')(space, np.zeros(0, np.int32))
  parts = report['quantized_bytes']
  assert parts['codes'] == pytest.approx(expected, rel=0.01)
  # The rest of the file is its header: eight bytes and JSON.
  content = (folder / report['file']).read_bytes()
  header = 8 + int.from_bytes(content[:8], 'little')
  assert len(content) == header + sum(parts.values())
  assert parts['unquantized'] == sum(report['unquantized'].values())


def test_a_program_takes_batches_of_any_size(deployed, exported):
  folder, _ = exported('stablehlo')
  images = deployed.inputs[0][0][:3]
  loader, file = folder / 'load_stablehlo.py', folder / 'model.stablehlo'
  (outputs,) = loading.run_batches(loader, file, batches=[(images,)])
  assert outputs[0].shape == (3, 10)
  program = jax.export.deserialize(bytearray(file.read_bytes())).mlir_module()
  products = re.findall(r'dot_general .* : \((.*)\) -> (.*)', program)
  kinds = {tuple(re.findall(r'x([a-z]\w*)>', ' '.join(types))) for types in products}
  assert kinds == {('i8', 'i8', 'i32')}


def test_onnx_has_integers_of_their_own_widths(exported):
  model = onnx.load(exported('onnx')[0] / 'model.onnx')
  kinds = {onnx.TensorProto.INT4: 'int4', onnx.TensorProto.INT8: 'int8'}
  weights = [t.data_type for t in model.graph.initializer if len(t.dims) > 1]
  stored = [kinds[dtype] for dtype in weights if dtype in kinds]
  assert stored == ['int4', 'int4', 'int8']  # conv, hidden (of int3), classifier
  nodes = [node.op_type for node in model.graph.node]
  assert nodes.count('QuantizeLinear') == 3
  assert nodes.count('DequantizeLinear') == 6


def captured(apply, variables, images):
  """The output of each layer of a network."""
  _, state = apply(variables, images, train=False, capture_intermediates=True)
  return {name: state['intermediates'][name]['__call__'][0] for name in LAYERS}


def test_qwix_computes_the_same_layer_by_layer(run, tmp_path):
  setup, state, result = run
  assigned = {
    path: {'weights': name, 'activations': name}
    for path, name in zip(LAYERS, ('int8', 'int8', 'e4m3'))
  }
  given = deployment.make_deployment(setup, state, {**result, 'formats': assigned})
  exporter.export(given, 'qwix', tmp_path / 'export')

  images = given.arguments(*given.inputs[0]).args[0]
  bound = fixed_space(setup.space.layers, assigned).bind(np.zeros(0, np.int32))
  variables = {**given.variables, 'formats': nest(setup.space.layers, bound)}
  expected = captured(setup.model.apply, variables, images)
  loader = loading.import_loader(tmp_path / 'export/load_qwix.py')
  model, loaded = loader.load(given.plain, tmp_path / 'export', images, train=False)
  found = captured(model.apply, loaded, images)
  for name in LAYERS:
    size = float(jnp.max(jnp.abs(expected[name])))
    np.testing.assert_allclose(found[name], expected[name], atol=1e-5 * size)
  assert loaded['params']['hidden']['kernel'].array.qvalue.dtype == jnp.int8
  # The same rules in Python.
  rules = {}
  exec((tmp_path / 'export/rules.py').read_text(), rules)
  assert rules['RULES'] == loader.read_rules(tmp_path / 'export')


def test_what_qwix_lacks_is_refused_by_name(deployed, tmp_path):
  with pytest.raises(ConfigError, match="layer 'conv': .*not int4 and int8: expected"):
    exporter.export(deployed, 'qwix', tmp_path / 'export')
  assert list(tmp_path.iterdir()) == []


def test_what_computes_something_else_is_not_kept(deployed, tmp_path):
  wrong = deployed.layers['hidden']
  wrong = wrong._replace(weight_scale=1.1 * wrong.weight_scale)
  layers = {**deployed.layers, 'hidden': wrong}
  with pytest.raises(loading.Mismatch, match='computes something else'):
    exporter.export(deployed._replace(layers=layers), 'safetensors', tmp_path / 'new')
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
  'count, factor, matches',
  [(3, 0.0, True), (4, 0.0, False), (360, 1.019, True), (360, 1.021, False)],
)
def test_one_output_in_a_hundred_may_be_another(deployed, count, factor, matches):
  # Of 360 examples; the first outputs are multiplied by a factor.
  expected = [np.array(deployed.searched(*inputs)) for inputs in deployed.inputs]
  changed = np.concatenate(expected)
  changed[:count] *= factor
  sizes = np.cumsum([len(batch) for batch in expected])[:-1]
  outputs = [[batch] for batch in np.split(changed, sizes)]
  if matches:
    assert verification.compare(deployed, outputs)['examples'] == 360
  else:
    with pytest.raises(loading.Mismatch, match='expected at most 0.02'):
      verification.compare(deployed, outputs)


def test_an_unknown_target_and_a_folder_in_use(deployed, tmp_path):
  with pytest.raises(ConfigError, match="'stablehlo'"):
    exporter.export(deployed, 'stable_hlo', tmp_path / 'export')
  (tmp_path / 'notes.txt').write_text('mine')
  with pytest.raises(ConfigError, match='exists and is no export'):
    exporter.export(deployed, 'stablehlo', tmp_path)
  (tmp_path / 'file').write_text('')
  with pytest.raises(ConfigError, match='cannot write to .*/file/export'):
    exporter.export(deployed, 'stablehlo', tmp_path / 'file/export')


def test_a_full_disk_leaves_no_half_file(deployed, tmp_path, monkeypatch):
  def no_space(deployment, folder):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  full = exporter.TARGETS['stablehlo']._replace(write=no_space)
  monkeypatch.setitem(exporter.TARGETS, 'stablehlo', full)
  with pytest.raises(ConfigError, match='No space left on device'):
    exporter.export(deployed, 'stablehlo', tmp_path / 'export')
  assert list(tmp_path.iterdir()) == []


def test_an_unfinished_run_is_refused(finished, tmp_path):
  with pytest.raises(ConfigError, match='holds no run'):
    evaluation.finished_run(epath.Path(tmp_path))
  config = json.loads((finished / 'config.json').read_text())
  (tmp_path / 'config.json').write_text(json.dumps(config))
  with pytest.raises(ConfigError, match='unfinished run'):
    evaluation.finished_run(epath.Path(tmp_path))
  config['dataset'] = 'own batches'
  (tmp_path / 'config.json').write_text(json.dumps(config))
  result = (finished / 'search_result.json').read_text()
  (tmp_path / 'search_result.json').write_text(result)
  with pytest.raises(ConfigError, match='call export of its result'):
    evaluation.finished_run(epath.Path(tmp_path))


def test_a_network_that_asks_for_the_size_of_its_batch():
  network = lambda x: x.reshape(len(x), -1).sum(-1)
  x = np.arange(12, dtype=np.float32).reshape(3, 4)
  shapes = deployment.symbolic_shapes((x,))
  of_any_batch = deployment.of_any_batch(network, shapes)
  assert of_any_batch(x).tolist() == [6, 22, 38]
  with pytest.raises(ConfigError, match='for a batch of any size: .*contracting'):
    deployment.of_any_batch(lambda x: x @ np.ones((3, 3)), shapes)


def page():
  return (ROOT / 'docs/deploy.md').read_text()


def test_the_reader_in_the_pages_is_the_one_that_is_written():
  reader = (loading.LOADERS / 'load_safetensors.py').read_text()
  assert f'```python\n{reader}```' in page()
  assert len([line for line in reader.splitlines() if line]) <= 60
