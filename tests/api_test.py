"""The Python interface: the README's example, a sequence model, and wrong input."""

import contextlib
import dataclasses
import functools
import importlib
import io
import json
import pathlib
import re

from conftest import ROOT
import flax
from flax import linen as nn
from flax import nnx
import grain
import jax
from jax.experimental.compilation_cache import compilation_cache
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import fliqs_jax
from fliqs_jax.api import own_network, training
from fliqs_jax.data import batches
from fliqs_jax.errors import ConfigError
from fliqs_jax.layers.variables import FORMATS, QUANT_STATS, nest
from fliqs_jax.reporting import terminal
from fliqs_jax.reporting.page import write_report
from fliqs_jax.runs import compilation, pretrained
from fliqs_jax.runs import result as results
from fliqs_jax.search.space import uniform_space
from fliqs_jax.training import classification, train_state, user_task

LENGTH, SYMBOLS = 8, 5


class Block(nn.Module):
  """A dense layer, as `nn.scan` takes it."""

  @nn.compact
  def __call__(self, x, _):
    return x + nn.Dense(8, name='dense')(nn.relu(x)), None


class Sequence(nn.Module):
  """A block of attention and scanned ones, a counter of its own, and dropout."""

  @nn.compact
  def __call__(self, tokens, deterministic):
    x = nn.Embed(SYMBOLS, 8)(tokens)
    mask = nn.make_causal_mask(tokens)
    x = x + nn.MultiHeadDotProductAttention(2, name='attention')(x, mask=mask)
    scan = {'variable_broadcast': 'params', 'split_rngs': {'params': False}}
    x, _ = nn.scan(Block, **scan, length=2)(name='scan')(x, None)
    calls = self.variable('counts', 'calls', jnp.zeros, (), jnp.int32)
    if not deterministic and self.is_mutable_collection('counts'):
      calls.value += 1
    x = nn.Dropout(0.1, deterministic=deterministic)(x)
    return nn.Dense(SYMBOLS, name='head')(x)


class Smallest(nn.Module):
  """A network that takes next to no time to compile."""

  @nn.compact
  def __call__(self, tokens):
    return nn.Dense(SYMBOLS)(jax.nn.one_hot(tokens, SYMBOLS))


class Always(nn.Module):
  """A network whose evaluation draws random numbers."""

  @nn.compact
  def __call__(self, x):
    return nn.Dropout(0.5, deterministic=False)(nn.Dense(2)(x))


def sequences(sizes):
  rng = np.random.default_rng(0)
  for size in sizes:
    yield {'tokens': rng.integers(SYMBOLS, size=(size, LENGTH))}


def loss(logits, batch):
  """Cross entropy of the next token, one value for each."""
  return optax.softmax_cross_entropy_with_integer_labels(logits, batch['tokens'][:, 1:])


TASK = {'loss': loss, 'inputs': lambda batch: batch['tokens'][:, :-1]}
FIELDS = {'formats': ['int2', 'int4', 'int8'], 'target_format': 'int4'}


def test_a_front_has_a_result_for_each_target(tmp_path):
  train, evaluated = list(sequences([8] * 4)), list(sequences([8]))
  fields = {**TASK, 'formats': FIELDS['formats'], 'num_steps': 8}
  found = fliqs_jax.search_front(
    Smallest(), train, evaluated, targets=['int2', '2*int4'], workdir=tmp_path, **fields
  )
  assert list(found) == ['int2', '2*int4']
  assert found['int2'].formats['Dense_0']['weights'] == 'int2'
  assert found['2*int4'].formats['Dense_0']['weights'] in ('int2', 'int4')
  for result in found.values():
    assert result.cost <= result.target
    assert result.eval['num_examples'] == 8
  shown, html = repr(found), found._repr_html_()
  measured = f'{found["int2"].eval["loss"]:.4f}'
  for text in ('2*int4', 'Uniform models: int2', measured):
    assert text in shown and text in html
  assert {path.name for path in tmp_path.iterdir()} == {
    'shared',
    *(f'searched-{target}-width1' for target in ('int2', '2xint4')),
  }
  with pytest.raises(ConfigError, match='train_batches is an iterator'):
    fliqs_jax.search_front(Smallest(), iter(train), evaluated, targets='int2', **fields)
  for targets in (None, {'int2': 1}):
    with pytest.raises(ConfigError, match='targets=.*: expected a list'):
      fliqs_jax.search_front(Smallest(), train, evaluated, targets=targets)
  with pytest.raises(ConfigError, match='expected fliqs_jax.search_front'):
    fliqs_jax.search(Smallest(), train, evaluated, targets=('int2',), **fields)


def test_search_is_the_function_and_has_a_folder_beside_it():
  importlib.import_module('fliqs_jax.search.space')
  assert fliqs_jax.search is training.search


def test_the_example_of_the_readme(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  readme = (ROOT / 'README.md').read_text()
  (code,) = re.findall(r'```python\n(import fliqs_jax\n.*?)```', readme, re.DOTALL)
  names = {}
  exec(code, names)
  result = names['result']
  assert set(result.formats) == {'Conv_0', 'Dense_0'}
  assert result.cost <= result.target
  assert result.eval['num_examples'] == 1797 - 23 * 64
  # The result's own network is what was evaluated.
  images, labels = names['images'][23 * 64 :], names['labels'][23 * 64 :]
  apply = jax.jit(functools.partial(result.model.apply, train=False))
  correct = np.sum(np.argmax(apply(result.variables, images), -1) == labels)
  assert result.eval['accuracy'] == pytest.approx(correct / 325)
  assert correct > 0.8 * 325
  assert {p.name for p in (tmp_path / 'runs/own').iterdir()} >= {
      'search_result.json', 'config.json', 'history.jsonl', 'checkpoints'
  }  # fmt: skip
  with pytest.raises(ConfigError, match='expected a new or empty folder'):
    result.save('runs/own')
  # Orbax alone reads the weights, as the documentation has it.
  page = (ROOT / 'docs/running.md').read_text()
  (code,) = re.findall(r'```python\n(import pathlib\n.*?)```', page, re.DOTALL)
  exec(code, names)
  jax.tree.map(
    np.testing.assert_array_equal,
    names['variables']['params'],
    result.variables['params'],
  )


@pytest.fixture(scope='module')
def searched(tmp_path_factory):
  """A search of a sequence model over a generator; its result and its evaluation."""
  workdir = tmp_path_factory.mktemp('own') / 'run'
  evaluation = list(sequences([16, 16, 5]))
  with (
    contextlib.redirect_stderr(io.StringIO()) as shown,
    # As a process may have it, whose own code is stricter.
    jax.numpy_rank_promotion('raise'),
    jax.numpy_dtype_promotion('strict'),
    jax.enable_x64(True),
    jax.debug_infs(True),
    jax.transfer_guard('disallow'),
  ):
    result = fliqs_jax.search(
      Sequence(), sequences([16, 16, 3, *[16] * 8]), evaluation, num_steps=10,
      log_every=5, num_samples=2, workdir=workdir, optimizer='adamw',
      metrics=lambda logits, batch: {'double': 2 * jnp.mean(loss(logits, batch))},
      **TASK, **FIELDS,
    )  # fmt: skip
  # What is searched, what is not, and how far it is.
  for text in ('6 layers are searched:', 'not searched: Embed_0', ' step 10/10  loss'):
    assert text in shown.getvalue()
  return result, evaluation


def test_a_search_that_measures_says_what_each_format_loses(searched):
  result, _ = searched
  losses = result.content['sensitivities']
  # Relative to the best format of each decision.
  assert {d: set(v) for d, v in losses.items()} == {
    d: set(options) for d, options in result.policy.items()
  }
  assert all(min(options.values()) == 0 for options in losses.values())
  assert max(max(options.values()) for options in losses.values()) > 0


def test_a_sequence_model_with_a_loss_of_its_own(searched):
  result, evaluation = searched
  projections = {f'attention/{name}' for name in ('query', 'key', 'value', 'out')}
  assert set(result.formats) == {*projections, 'scan/dense', 'head'}
  assert result.cost <= result.target
  assert [line['step'] for line in result.history] == [5, 10]
  assert result.history[0]['quality'] == pytest.approx(-result.history[0]['loss'])
  # Ten steps, of which each sample counted one.
  assert result.variables['counts']['calls'] == 10

  # Every example counts alike, whatever the size of its batch.
  @jax.jit
  def losses(batch):
    arguments = result.variables, TASK['inputs'](batch)
    logits = result.model.apply(*arguments, deterministic=True)
    return jnp.mean(loss(logits, batch), axis=1)

  values = np.concatenate([losses(batch) for batch in evaluation])
  assert result.eval['num_examples'] == values.size == 37
  assert result.eval['loss'] == pytest.approx(values.mean(), rel=1e-5)
  assert result.eval['quality'] == pytest.approx(-values.mean(), rel=1e-5)
  assert result.eval['double'] == pytest.approx(2 * values.mean(), rel=1e-5)


def test_the_result_is_read_without_the_network(searched, capsys):
  result, _ = searched
  layers = json.loads(pathlib.Path(result.workdir, 'layers.json').read_text())
  assert [layer['path'] for layer in layers] == list(result.formats)
  assert [layer['macs'] for layer in layers] == [
    layer.macs for layer in result.coverage.layers
  ]
  terminal.print_result(result.content, 'DIR')
  shown = f'quality: {result.eval["quality"]:.6g}'
  assert shown in capsys.readouterr().out


def test_the_report_of_a_loss_of_its_own(searched, tmp_path, monkeypatch):
  result, _ = searched
  folders = [str(tmp_path / name) for name in ('saved', 'other')]
  for folder in folders:
    result.save(folder)
  path = folders[1] + '/' + results.RESULT_FILE
  better = {'eval': {**result.eval, 'quality': result.eval['quality'] + 0.25}}
  pathlib.Path(path).write_text(json.dumps({**result.content, **better}))
  page = write_report(folders).read_text()
  quality = f'{result.eval["quality"]:.4g}'
  assert f'The formats found get a quality of {quality} on 37 examples' in page
  assert f'<dt>One-shot quality</dt><dd>{quality}<small>37 examples' in page
  assert 'Training quality' in page and 'Training accuracy' not in page
  better = f'{result.eval["quality"] + 0.25:.4g}'
  first, second = (
    run.split(')')[0]
    for run in page.split('Quality against cost: ')[1].split(' (')[1:3]
  )
  assert quality in first and 'front' not in first
  assert better in second and second.endswith('on the front')
  # No command knows the network and the data, and the page says so.
  assert 'By the same call of <code>fliqs_jax.search' in page
  assert 'fliqs_jax.main' not in page and 'on digits' not in page
  monkeypatch.syspath_prepend(str(ROOT / 'configs'))
  import again

  with pytest.raises(ValueError, match='was made by fliqs_jax.search'):
    again.get_config(folders[0])


def test_export(searched, tmp_path):
  # Attention, embeddings, and layers in a scan, whose inputs set their own scales.
  result, _ = searched
  report = result.export('stablehlo', tmp_path / 'export')
  assert report['agreement'] == 1.0
  assert report['eval']['loss'] == pytest.approx(result.eval['loss'], rel=1e-4)
  assert result.export('onnx', tmp_path / 'onnx')['agreement'] == 1.0


def test_evaluation_of_a_saved_search(searched, tmp_path):
  result, evaluation = searched
  result.save(tmp_path / 'saved')
  (tmp_path / 'made').mkdir()
  assert (tmp_path / 'saved').stat().st_mode == (tmp_path / 'made').stat().st_mode
  path = str(tmp_path / 'saved' / results.RESULT_FILE)
  own = fliqs_jax.evaluate(
    Sequence(), evaluation, tmp_path / 'saved', formats=path, **TASK
  )
  assert own['loss'] == pytest.approx(result.eval['loss'], rel=1e-5)
  with pytest.raises(ConfigError, match='holds no run'):
    fliqs_jax.evaluate(Sequence(), evaluation, tmp_path / 'nothing', **TASK)
  unknown = {'.*': 'int9'}
  with pytest.raises(ConfigError, match=r"layer \"\.\*\": unknown format 'int9'"):
    fliqs_jax.evaluate(
      Sequence(), evaluation, tmp_path / 'saved', formats=unknown, **TASK
    )


# Layers and costs


def test_an_overview_has_the_layers_and_the_costs():
  found = fliqs_jax.overview(
    Sequence(),
    np.zeros((16, LENGTH), int),
    formats={'attention/.*': 'int8', '.*': 'int4'},
  )
  # Of one example: four projections 8 -> 8, twice the layer in the scan, and the head.
  macs = {'dense': LENGTH * 64, 'scan': 2 * LENGTH * 64, 'head': LENGTH * 8 * SYMBOLS}
  assert found.macs == 4 * macs['dense'] + macs['scan'] + macs['head']
  assert found.total == pytest.approx(
    (4 * macs['dense'] * 64 + (macs['scan'] + macs['head']) * 16) / 1e9
  )
  assert found.params == 4 * 72 + 72 + 9 * SYMBOLS + 8 * SYMBOLS
  head = found.layers[-1]
  assert head['name'] == 'head' and head['kind'] == 'dense'
  assert head['weights'] == head['activations'] == 'int4'
  assert found.uniform_costs['int8'] == pytest.approx(found.macs * 64 / 1e9)
  (target,) = found.budgets
  for name in ('limit', 'low'):
    assert target[name] == pytest.approx(found.uniform_costs['int4'])
  shown, html = repr(found), found._repr_html_()
  for text in ('attention/query', 'int8', 'Sequence: ', 'not searched: Embed_0'):
    assert text in shown and text in html
  assert html.count('<tr>') == 1 + len(found.layers)
  assert html.count('<td') == 8 * len(found.layers)


@pytest.mark.parametrize(
  'model, inputs, expected',
  [
    (Sequence, [], 'found the class Sequence'),
    (Smallest(), [], 'does not fit its arguments'),
    (Smallest(), ['abc'], "inputs gives 'abc' as an argument"),
    (Smallest(), [None], r'inputs gives \(None,\) to the network'),
    (nn.Dense(2), [np.float32(1)], r'Dense called with \(\(\),\): .: .*index out of'),
    (Always(), [np.ones((1, 3))], 'cannot be called in evaluation, without rngs'),
    (nnx.bridge.ToLinen(nnx.Linear, (3, 2)), [np.ones((1, 3))], 'in nnx.bridge.ToLin'),
    (nnx.bridge.ToNNX(nn.Dense(2)), [np.ones((1, 3))], 'in nnx.bridge.ToNNX: expected'),
  ],
)
def test_wrong_input_of_an_overview_is_named(model, inputs, expected):
  with pytest.raises(ConfigError, match=expected):
    fliqs_jax.overview(model, *inputs)


# Fixed formats


def test_formats_are_trained_however_they_are_given(tmp_path):
  (batch,) = sequences([16])
  train = functools.partial(
    fliqs_jax.train, Smallest(), [batch], [batch], num_steps=2, **TASK
  )
  folder, int8 = tmp_path / 'run', {'Dense_.*': 'int8'}
  fixed = train(formats=int8, workdir=folder)
  assert fixed.formats == {'Dense_0': {'weights': 'int8', 'activations': 'int8'}}
  # 7 tokens of an example, each a vector of SYMBOLS numbers.
  assert fixed.cost == pytest.approx(7 * SYMBOLS**2 * 8 * 8 / 1e9)
  assert fixed.target is None and fixed.policy == {}
  assert [line['step'] for line in fixed.history] == [2]
  fixed.save(tmp_path / 'saved')
  path = tmp_path / 'saved' / results.RESULT_FILE
  assert train(formats='int8').eval == fixed.eval
  evaluate = functools.partial(fliqs_jax.evaluate, Smallest(), [batch], folder, **TASK)
  assert evaluate() == evaluate(formats=fixed) == evaluate(formats=path) == fixed.eval
  # The same call goes on where it was, and another one does not.
  assert train(formats=int8, workdir=folder).eval == fixed.eval
  with pytest.raises(ConfigError, match='holds a run with another config: formats'):
    train(formats=fixed, workdir=folder)
  shown = repr(fixed)
  for text in ('Dense_0', '8 × 8', f'Cost: {1e6 * fixed.cost:.6g} kBOPs', str(folder)):
    assert text in shown and text in fixed._repr_html_()
  coverage = fixed.coverage
  assert repr(coverage) == str(coverage) and 'Dense_0: dense' in repr([coverage])
  assert repr(fixed.model) == f'Searchable({Smallest()!r})'
  assert fixed.export('safetensors', tmp_path / 'export')['agreement'] == 1.0
  page = write_report([str(tmp_path / 'saved')]).read_text()
  assert 'By the same call of <code>fliqs_jax.train' in page


def test_float32_trains_as_plain_flax_does():
  (batch,) = sequences([16])
  model, inputs = Smallest(), TASK['inputs'](batch)
  start = model.init(jax.random.key(3), inputs)
  result = fliqs_jax.train(
    model, [batch], [batch], formats='float32', variables=start, num_steps=3,
    learning_rate=0.1, warmup_steps=0, weight_decay=0.0, **TASK,
  )  # fmt: skip
  optimizer = optax.sgd(optax.cosine_decay_schedule(0.1, 3), momentum=0.9)
  params, state = start['params'], optimizer.init(start['params'])
  total = lambda params: loss(model.apply({'params': params}, inputs), batch).mean()
  for _ in range(3):
    updates, state = optimizer.update(jax.grad(total)(params), state, params)
    params = optax.apply_updates(params, updates)
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
    result.variables['params'], params,
  )  # fmt: skip
  assert result.eval['loss'] == pytest.approx(float(total(params)), rel=1e-5)


@pytest.mark.parametrize(
  'arguments, expected',
  [
    ({'formats': 'int9'}, "unknown format 'int9'"),
    ({'formats': 5}, "'formats' holds no formats of layers"),
    ({'formats': {}}, "'formats' holds no formats of layers"),
    ({'formats': {'head': 'int8'}}, 'which matches the whole path of no layer'),
    ({'formats': 'there_is/none.json'}, "cannot read 'there_is/none.json'"),
    ({'num_samples': 2}, "unknown argument 'num_samples'"),
    ({'target_format': 'int4'}, "unknown argument 'target_format'"),
    ({'reward': 'absolute'}, "unknown argument 'reward'"),
  ],
)
def test_wrong_input_of_a_training_is_named(arguments, expected, tmp_path):
  (batch,) = sequences([16])
  arguments = {'formats': 'int8', 'num_steps': 2, **TASK, **arguments}
  with pytest.raises(ConfigError, match=re.escape(expected)):
    fliqs_jax.train(Smallest(), [batch], [batch], workdir=tmp_path / 'run', **arguments)
  assert not (tmp_path / 'run').exists()


def test_an_evaluation_that_is_not_finite_stops_the_run(tmp_path):
  def nan_in_evaluation(outputs, batch):
    return {'ratio': jnp.mean(jnp.log(batch['scale']))}

  train, evaluation = [
    [batch | {'scale': np.full(16, scale, np.float32)}]
    for (batch,), scale in ((list(sequences([16])), 1), (list(sequences([16])), -1))
  ]
  with pytest.raises(FloatingPointError, match='ratio is nan over the 16 examples'):
    search(train, evaluation, metrics=nan_in_evaluation, workdir=tmp_path / 'run')
  assert not (tmp_path / 'run' / results.RESULT_FILE).exists()


@pytest.fixture
def no_cache():
  """As in the process of a user, who has not asked for a cache."""
  names = 'jax_compilation_cache_dir', 'jax_persistent_cache_min_compile_time_secs'
  before = {name: getattr(jax.config, name) for name in names}
  jax.config.update(names[0], None)
  compilation_cache.reset_cache()
  yield
  for name, value in before.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()


def test_a_home_folder_and_programs_are_found_by_a_tilde(
  no_cache, tmp_path, monkeypatch
):
  monkeypatch.setenv('HOME', str(tmp_path))
  jax.jit(jnp.sin)(1.0)  # the user's own program settles that there is no cache
  result = search(
    model=Smallest(), num_steps=2, strategy='uniform', workdir='~/run',
    compilation_cache='~/programs',
  )  # fmt: skip
  assert result.workdir == str(tmp_path / 'run')
  assert list((tmp_path / 'programs').glob('jit_*-cache'))
  result.save('~/saved')
  assert (tmp_path / 'saved' / results.RESULT_FILE).exists()
  evaluated = fliqs_jax.evaluate(Smallest(), [*sequences([16])], '~/saved', **TASK)
  assert evaluated['loss'] == pytest.approx(result.eval['loss'], rel=1e-5)


def test_programs_are_not_kept_where_no_folder_can_be_made(no_cache, tmp_path):
  (tmp_path / 'file').write_text('')
  compilation.keep_programs(str(tmp_path / 'file' / 'programs'))
  assert jax.config.jax_compilation_cache_dir is None


# Wrong input


def search(train=None, evaluation=None, model=None, **arguments):
  given = [list(sequences([16])) if b is None else b for b in (train, evaluation)]
  arguments = {'num_steps': 4, 'num_samples': 2, **TASK, **FIELDS, **arguments}
  return fliqs_jax.search(model or Smallest(), *given, **arguments)


def labelled(label):
  """A batch whose sequences all have one label."""
  (batch,) = sequences([16])
  return [batch | {'label': np.full((16, LENGTH - 1), label)}]


class NoLayers(nn.Module):
  @nn.compact
  def __call__(self, tokens):
    return nn.Embed(SYMBOLS, SYMBOLS)(tokens)


class Sowing(nn.Module):
  @nn.compact
  def __call__(self, tokens):
    x = nn.Dense(SYMBOLS)(nn.Embed(SYMBOLS, 8)(tokens))
    self.sow('losses', 'norm', jnp.sum(x))
    return x


def call(code, name='Called'):
  """A network whose call is given as text, with a dense layer and dropout to use."""

  class Called(nn.Module):
    @nn.compact
    def run(self, x, train):
      return nn.Dropout(0.5, deterministic=not train)(nn.Dense(SYMBOLS)(x))

  scope = {}
  exec(f'def __call__(self, {code}', scope)
  return type(name, (Called,), scope)()


VECTORS = [{'image': np.ones((4, 3), np.float32), 'label': np.zeros(4, int)}]
CLASSES = {'train': VECTORS, 'evaluation': VECTORS, 'loss': None, 'inputs': 'image'}


def one_hot(*classes):
  """Labels of the batch of vectors as one-hot rows of integers."""
  label = np.eye(SYMBOLS, dtype=int)[list(classes)]
  return CLASSES | {'train': [VECTORS[0] | {'label': label}]}


class Complex(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.Dense(SYMBOLS, param_dtype=jnp.complex64, name='wave')(x).real


class Slash(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.Dense(SYMBOLS, name='a/b')(x)


class Growing(nn.Module):
  @nn.compact
  def __call__(self, x):
    count = self.variable('counts', 'calls', jnp.zeros, (), jnp.int32)
    if self.is_mutable_collection('counts'):
      count.value = count.value + (0 if self.is_initializing() else 0.5)
    return nn.Dense(SYMBOLS)(x)


class Loop(nn.Module):
  @nn.compact
  def __call__(self, tokens):
    dense = nn.Dense(SYMBOLS, name='loop')
    start = 0, dense(nn.Embed(SYMBOLS, SYMBOLS)(tokens))
    body = lambda _, carry: (carry[0] + 1, dense(carry[1]))
    return nn.while_loop(lambda _, carry: carry[0] < 3, body, self, start)[1]


@pytest.mark.parametrize(
  'arguments, expected',
  [
    ({'num_step': 3}, "unknown argument 'num_step': .* the nearest is 'num_steps'"),
    ({'target_scale': 'much'}, "target_scale='much'"),
    ({'target_scale': 0.01}, 'cannot be reached: expected one from'),
    ({'num_samples': 3}, 'batch_size=16: expected a multiple of'),
    ({'train': []}, 'train_batches is empty'),
    ({'train': [np.zeros((4, 3))], 'inputs': 'x'}, 'a batch is no dict: expected d'),
    ({'train': [{'tokens': ['a', 'b']}]}, r"\['tokens'\]\[0\] holds <U1: expected num"),
    ({'evaluation': iter([])}, 'eval_batches is empty'),
    ({'formats': 4}, 'formats=4: '),
    ({'model': Sequence}, 'instance of a linen or an NNX .* found the class Seq'),
    ({'evaluation': [{'token': np.zeros((4, 8), int)}], 'inputs': 'tokens',
      'loss': lambda logits, batch: jnp.mean(logits)}, "a batch lacks: .* 'token'"),
    ({'loss': None, 'train': labelled(5), 'evaluation': labelled(4)}, 'holds 5: expec'),
    ({'loss': None, 'train': labelled(4), 'evaluation': labelled(-1)}, 'holds -1: exp'),
    ({'loss': None}, r'default loss takes .* \(16, 7, 5\) and None: expected loss'),
    ({'loss': lambda logits, batch: (logits, {})}, r'has shape \(\(16, 7, 5\), {}\)'),
    ({'train': [{'tokens': np.zeros((4, 2)), 'x': np.zeros(3)}]}, 'along the first'),
    ({'inputs': 'token'}, "fed from 'token', .* the nearest is 'tokens'"),
    ({'model': NoLayers()}, 'no layer of NoLayers can be searched\nEmbed_0: it is in '),
    ({'model': Sowing()}, "its collection 'losses'"),
    ({'model': Loop()}, 'layer loop runs in a loop of unknown length'),
    ({'variables': {'head': {}}}, "expected {'params': ...}, found head"),
    ({'variables': {'params': {}}, 'init_from': 'x'}, 'expected one of them'),
    ({'loss': lambda logits, batch: logits.T}, r'loss has shape \(5, 7, 16\)'),
    ({'model': 'resnet18'}, "instance of a linen or an NNX module.* found 'resnet18'"),
    # Fields
    ({'learning_rate': lambda step: 0.1}, 'learning_rate=<func.*: expected a value '),
    ({'formats': [4, 8]}, "unknown format '4'"),
    ({'warmup_steps': 9}, 'warmup_steps=9: expected no more than num_steps=4'),
    ({'config': {'num_steps': 4}}, "config={'num_steps': 4}: expected a config fr"),
    ({'config': ml_collections.ConfigDict({'seed': 1})}, 'config lacks architecture, '),
    # Functions
    ({'loss': 'mse'}, r"loss='mse': expected a function of \(outputs, batch\)"),
    ({'loss': lambda logits: 0.0}, 'loss is a function with too many positional argum'),
    ({'metrics': [loss]}, r'metrics=\[<fun.*\]: expected a function of \(outputs'),
    ({'loss': lambda logits, batch: 'low'}, 'loss returns str: expected real numbers'),
    ({'loss': lambda logits, batch: jnp.argmax(logits, -1)}, 'loss returns int32: exp'),
    ({'inputs': lambda: 5}, r'inputs is a function of \(\): expected one of \(batch'),
    ({'inputs': lambda batch: None}, r'inputs gives \(None,\) to the network: expect'),
    # Batches
    ({'train': [{'tokens': np.zeros((0, 8), int)}]}, 'a batch has no examples: expect'),
    ({'evaluation': [*sequences([4]), {'tokens': np.zeros((0, 8), int)}]},
     'eval_batches: a batch has no examples: expected one or more'),
    ({'train': [*sequences([16]), {'tokens': np.zeros((16, 9))}]},
     r"train_batches: a batch has float32\[B, 9\] in \['tokens'\] where the first"),
    ({'train': [{0: np.zeros((4, 8), int)}], 'inputs': 'x'}, "one of 0; the nearest"),
    ({'train': 5}, 'train_batches=5: expected a list of batches'),
    ({'evaluation': 'abc'}, "eval_batches='abc': expected a list of batches"),
    ({'train': object()}, 'train_batches=<object .*: expected a list of batches'),
    ({'train': VECTORS[0]}, 'train_batches is one dict of image, label: expected a l'),
    ({'evaluation': VECTORS[0]}, 'eval_batches is one dict of image, label: expected'),
    ({'train': np.ones((4, 3))}, r'train_batches is one array \(4, 3\): expected a l'),
    ({'train': lambda path: []}, "train_batches is a function with missing .* 'path'"),
    ({'train': lambda: 5}, r'train_batches\(\)=5: expected a list of batches'),
    ({'train': lambda: VECTORS[0]}, r'train_batches\(\) is one dict of image, label'),
    ({'inputs': 5}, 'inputs=5: expected the name of an entry of a batch'),
    # Labels
    (one_hot(0, 1, 2, 3) | {'train': [VECTORS[0] | {'label': np.ones((4, 5), int)}],
      'model': call('x): return self.run(x, False)')},
     'holds 1, 1, 1, 1, 1: expected probabilities of the 5 classes, which sum to 1'),
    (CLASSES | {'train': [VECTORS[0] | {'label': np.full(4, 0.5)}],
      'model': call('x): return self.run(x, False)')}, 'holds 0.5: expected classes f'),
    (CLASSES | {'train': [VECTORS[0] | {'label': np.zeros((4, 1))}],
      'model': call('x): return self.run(x, False)')}, r'\(4, 5\) and \(4, 1\): exp'),
    # Values of the user's functions
    ({'metrics': lambda logits, batch: 5}, 'metrics returns 5: expected a dict of val'),
    ({'metrics': lambda logits, batch: {1: 1.0}}, 'metrics returns {1: 1.0}: expected'),
    ({'metrics': lambda logits, batch: {'policy': 1.0}}, "metrics returns 'policy',"),
    ({'metrics': lambda logits, batch: {'a': 1j}}, 'a is complex: expected real numb'),
    ({'metrics': lambda logits, batch: {'a': [1.0]}}, r'a has shape \[\(\)\] for a b'),
    # Calls
    (CLASSES | {'model': call('x, mode): return self.run(x, mode == "train")')},
     r"the call of Called, Called\(self, x, mode\), does not fit .* argument: 'mode'"),
    (CLASSES | {'model': call('x, *, mode): return self.run(x, mode)')}, "'mode'"),
    (CLASSES | {'model': call('x, y): return self.run(x, True)')}, "argument: 'y'"),
    (CLASSES | {'model': call('): return self.run(x, True)')}, 'too many positional'),
    (CLASSES | {'model': call('x, is_train=True): return self.run(x, is_train)')},
     'cannot be called in evaluation, without rngs .*flags train, training, is_training'
     ', deterministic, .* or else inputs=.*args, kwargs'),
    (CLASSES | {'model': call('x): return self.run(x, False)'),
      'inputs': lambda batch: (batch['image'], 'mode')}, "inputs gives 'mode' as"),
    (CLASSES | {'model': call('x): return {"logits": self.run(x, False)}')},
     "found {'logits': \\(4, 5\\)} and \\(4,\\): expected loss="),
    # Networks
    (CLASSES | {'model': Complex()}, 'can be searched\nwave: it computes with complex'),
    (CLASSES | {'model': Slash()}, "a module named 'a/b': expected a name without"),
    (CLASSES | {'model': Growing()}, "changes the shape or the dtype of .* 'counts'"),
    ({'variables': {'params': 5}}, r"params/ has shape|params/ \(\) is unknown"),
    ({'model': Sequence(),
      'variables': {'params': {'head': {'kernel': np.zeros((8, 4))}}}},
     r'params/head/kernel has shape \(8, 4\): expected shape \(8, 5\)'),
  ],
)  # fmt: skip
def test_wrong_input_is_named(arguments, expected, tmp_path):
  with pytest.raises(ConfigError) as error:
    search(**arguments, workdir=tmp_path / 'run')
  assert re.search(expected, str(error.value), re.DOTALL), str(error.value)
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('workdir', [5, '', 'a\0b'])
def test_a_workdir_that_is_no_path_is_named(workdir):
  with pytest.raises(ConfigError, match='^workdir=.*: expected the path of a file or '):
    search(workdir=workdir)


def test_layers_compute_with_float64_where_they_are_given_it():
  for plain in (nn.Dense(2), nnx.Linear(3, 2, rngs=nnx.Rngs(0))):
    model, x = fliqs_jax.make_searchable(plain), np.ones((4, 3)) / 3
    space = uniform_space(model.coverage(x).layers, 'int4')
    formats = {FORMATS: nest(space.layers, space.bind(np.zeros(0, np.int32)))}
    with jax.enable_x64(True):
      variables = model.init(jax.random.key(0), x)
      outputs, updated = model.apply({**variables, **formats}, x, mutable=[QUANT_STATS])
    assert outputs.dtype == np.float64
    kept = jax.tree.leaves((variables[QUANT_STATS], updated))
    assert len(kept) == 4 and all(leaf.dtype == np.float32 for leaf in kept)


def test_unknown_attributes_of_operators_are_named():
  with pytest.raises(ConfigError, match="unknown argument 'foo': expected one of act"):
    fliqs_jax.make_searchable(Smallest(), foo=1)
  with pytest.raises(ConfigError, match="calibration='max': expected one of rms, abs"):
    fliqs_jax.make_searchable(Smallest(), calibration='max')


@dataclasses.dataclass
class Output:
  """Outputs of a network, in a class that JAX does not know as a tree."""

  logits: jax.Array


class Boxed(nn.Module):
  """A network with an argument by name, boxed parameters, and an output of its own."""

  @nn.compact
  def __call__(self, x, *, scale, is_train):
    x = nn.Dropout(0.1, deterministic=not is_train)(x * scale[:, None])
    init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, 'model'))
    side = x @ self.param('side', init, (3, SYMBOLS))
    return Output(side + nn.Dense(SYMBOLS, kernel_init=init, name='head')(x))


def test_arguments_by_name_boxes_frozen_dicts_and_outputs_of_the_users(tmp_path):
  def inputs(batch, train):
    return (batch['image'],), {'scale': batch['scale'], 'is_train': train}

  def own_loss(output, batch):
    return optax.softmax_cross_entropy_with_integer_labels(
      output.logits, batch['label']
    )

  batch = VECTORS[0] | {'scale': np.full(4, 2.0, np.float32)}
  kernel = np.random.default_rng(0).normal(size=(3, SYMBOLS)).astype(np.float32)
  params = {
    'side': -kernel,
    'head': {'kernel': kernel, 'bias': np.zeros(SYMBOLS, np.float32)},
  }
  result = fliqs_jax.search(
    Boxed(), [batch], [batch], loss=own_loss, inputs=inputs,
    metrics=lambda output, batch: {'answer': 42},
    variables=flax.core.freeze({'params': params}), workdir=tmp_path / 'run',
    num_steps=2, num_samples=1, learning_rate=1e-9, strategy='uniform', **FIELDS,
  )  # fmt: skip
  assert result.eval['answer'] == 42
  assert set(result.formats) == {'side', 'head'}
  # With so small a learning rate the weights are those that were given.
  np.testing.assert_allclose(result.variables['params']['head']['kernel'], kernel, 1e-5)
  output = result.model.apply(
    result.variables, batch['image'], scale=batch['scale'], is_train=False
  )
  expected = own_loss(output, batch).mean()
  assert result.eval['loss'] == pytest.approx(float(expected), rel=1e-5)
  with pytest.raises(ConfigError, match='the network returns Output: expected arrays'):
    result.export('safetensors', tmp_path / 'export')
  assert not (tmp_path / 'export').exists()


class TwoHeads(nn.Module):
  """A head that is there in training alone, and one in evaluation alone, maybe."""

  odd: bool = False

  @nn.compact
  def __call__(self, x, train):
    if train:
      x = x + nn.Dense(3, name='second')(x)
    elif self.odd:
      x = nn.Dense(3, name='odd')(x)
    return nn.Dense(SYMBOLS, name='head')(x)


def test_a_network_starts_with_all_of_its_parameters():
  scores = own_network.Scores(None, None, None, 'image')
  check = lambda model: own_network.check_network(
    fliqs_jax.default_config(), model, scores, *2 * VECTORS
  )
  network, coverage = check(TwoHeads())
  assert network.example.kwargs == {'train': True}
  variables = jax.eval_shape(
    functools.partial(network.model.init, **network.example.kwargs),
    jax.random.key(0), *network.example.args,
  )  # fmt: skip
  assert set(variables['params']) == {'second', 'head'}
  # Costs are those of inference.
  assert [layer.path for layer in coverage.layers] == ['head']
  with pytest.raises(ConfigError, match=r"\['odd'\]\['bias'\] is there in evalu"):
    check(TwoHeads(odd=True))


def test_integer_one_hot_labels_are_probabilities():
  logits = np.random.default_rng(0).normal(size=(SYMBOLS, SYMBOLS)).astype(np.float32)
  classes = np.arange(SYMBOLS)[::-1]
  rows = np.eye(SYMBOLS, dtype=np.int32)[classes]  # as many as there are classes
  for function in (classification.cross_entropy, classification.is_correct):
    np.testing.assert_array_equal(function(logits, rows), function(logits, classes))


# Batches


def test_every_batch_is_checked():
  def check(batch):
    if problem := classification.label_problem(batch['label'], (4, SYMBOLS)):
      raise ConfigError(problem)

  first = batches.to_arrays(VECTORS[0], 'train_batches')
  stray = {
    'holds -1: expected classes from 0 to 4': {'label': np.array([0, 1, -1, 2])},
    r"in \['image'\] where the first one has float32\[B, 3\]": {
      'image': np.ones((4, 2))
    },
    r"has nothing in \['label'\]": {'label': None},
    r"has int32\[B\] in \['more'\] where the first one has nothing": {
      'more': np.zeros(4, int)
    },
    'holds <U1: expected numbers': {'label': np.array(list('abcd'))},
  }
  for expected, changed in stray.items():
    changed = {k: v for k, v in (VECTORS[0] | changed).items() if v is not None}
    for name, make in (
      ('train_batches', lambda *args: batches.TrainBatches(args[0], 2, 4, args[1])),
      ('eval_batches', batches.eval_batches),
    ):
      taken = make([VECTORS[0], changed], batches.alike(name, first, check))
      next(taken)
      with pytest.raises(ConfigError, match=f'^{name}: .*{expected}'):
        next(taken)


class Rows(grain.MapDataset):
  """A dataset of Grain's, of batches that are numbered."""

  def __len__(self):
    return 6

  def __getitem__(self, index):
    return {'x': np.full(4, index)}


def test_iterators_of_grain_keep_their_position_in_json():
  loader = grain.DataLoader(
    data_source=Rows(),
    sampler=grain.samplers.SequentialSampler(6, grain.sharding.NoSharding()),
  )
  for source in (lambda: iter(loader), lambda: iter(Rows())):
    _, again = batches.first_batch(source(), 'train_batches')
    stream = batches.TrainBatches(again, 1, 4)
    taken = [next(stream)['x'][0, 0] for _ in range(3)]
    assert taken == [0, 1, 2]
    position = json.loads(json.dumps(stream.get_state()))
    resumed = batches.TrainBatches(source(), 1, 4)
    resumed.set_state(position)
    assert next(resumed)['x'][0, 0] == 3


def test_a_position_that_no_checkpoint_can_keep_is_refused_at_once():
  class Stream(list):
    def __iter__(self):
      return self

    __next__ = get_state = set_state = object

  with pytest.raises(ConfigError, match=r'^train_batches: the get_state\(\) of '):
    batches.first_batch(Stream(), 'train_batches')


def test_a_list_starts_over_and_a_generator_ends():
  again = batches.TrainBatches(list(sequences([4, 4, 2])), 2, 4)
  taken = [next(again)['tokens'] for _ in range(5)]
  assert taken[0].shape == (2, 2, LENGTH) and taken[0].dtype == np.int32
  np.testing.assert_array_equal(taken[0], taken[2])
  np.testing.assert_array_equal(taken[0], taken[4])
  once = batches.TrainBatches(sequences([4, 4]), 2, 4)
  assert len(list(once)) == 2


@pytest.mark.parametrize('kind', ['list', 'factory', 'generator'])
def test_a_stream_goes_on_from_its_position(kind):
  def source():
    if kind == 'list':
      return list(sequences([4] * 3))
    return (lambda: sequences([4] * 6)) if kind == 'factory' else sequences([4] * 6)

  stream = batches.TrainBatches(source(), 1, 4)
  for _ in range(4):
    next(stream)
  position, expected = stream.get_state(), next(stream)
  resumed = batches.TrainBatches(source(), 1, 4)
  resumed.set_state(position)
  jax.tree.map(np.testing.assert_array_equal, next(resumed), expected)


def test_the_first_batch_is_seen_twice():
  first, source = batches.first_batch(sequences([4, 4]), 'train_batches')
  taken = [batch['tokens'] for batch in batches.eval_batches(source)]
  assert len(taken) == 2
  np.testing.assert_array_equal(first['tokens'], taken[0])


@pytest.mark.parametrize(
  'flag, value',
  [
    ('train', True),
    ('is_training', True),
    ('deterministic', False),
    ('use_running_average', False),
  ],
)
def test_the_flag_of_training_has_many_names(flag, value):
  scope = {}
  exec(f'def call(self, x, {flag}=None): return x', scope)
  model = type('Model', (nn.Module,), {'__call__': scope['call']})()
  arguments = user_task.make_task(model).arguments
  batch = {'image': np.float32(1)}
  assert arguments(batch, True) == ((1,), {flag: value})
  assert arguments(batch, False) == ((1,), {flag: not value})


def test_the_flag_is_that_of_the_network_and_not_of_one_within():
  class Wrapper(nn.Module):
    model: nn.Module

    @nn.compact
    def __call__(self, x, train):
      return self.model(x)

  wrapper = Wrapper(nn.Dense(1))
  for model in (wrapper, fliqs_jax.make_searchable(wrapper)):
    given = user_task.make_task(model).arguments({'image': np.ones((1, 2))}, True)
    assert given.kwargs == {'train': True}


# Variables to start from


def test_variables_of_any_orbax_checkpoint(searched, tmp_path):
  result, _ = searched
  params = result.variables['params']
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / 'standard', {'params': params, 'step': 3})
  for path in (tmp_path / 'standard', result.workdir):
    given = pretrained.read(str(path))
    jax.tree.map(np.testing.assert_array_equal, given['params'], params)
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / 'other', {'weights': params})
  with pytest.raises(ValueError, match='expected a checkpoint with `params`, found w'):
    pretrained.read(str(tmp_path / 'other'))
  with pytest.raises(ValueError, match='does not exist'):
    pretrained.read(str(tmp_path / 'nothing'))


def test_a_start_is_checked_and_taken(searched):
  result, _ = searched
  example = train_state.Arguments(
    (jnp.zeros((1, LENGTH), jnp.int32),), {'deterministic': True}
  )
  params = dict(result.variables['params'])
  pretrained.check(Sequence(), example, {'params': params})
  state = train_state.create_train_state(
    Sequence(), example, optax.sgd(0.1), None, jax.random.key(5)
  )
  started = pretrained.start_from(state, {'params': params})
  jax.tree.map(np.testing.assert_array_equal, started.params, params)
  params['neck'] = params.pop('head')
  with pytest.raises(ValueError) as error:
    pretrained.check(Sequence(), example, {'params': params})
  assert [line.split(': ')[1] for line in str(error.value).splitlines()] == [
    'params/head/bias is missing',
    'params/head/kernel is missing',
    'params/neck/bias (5,) is unknown to the network',
    'params/neck/kernel (8, 5) is unknown to the network',
  ]
