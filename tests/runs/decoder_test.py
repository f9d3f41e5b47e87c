"""A search of a decoder from its config to its result."""

from conftest import load_config
import pytest

from fliqs_jax.errors import ConfigError
from fliqs_jax.exporting import deployment, exporter
from fliqs_jax.runs import evaluation, loop
from fliqs_jax.runs.config import resolve
from fliqs_jax.runs.network import build_model, discover_layers
from fliqs_jax.runs.validation import validate


@pytest.fixture(scope='module')
def decoder_config(text_config):
  """A search on Python's library that takes seconds, of one block with experts."""
  config = load_config('gemma_like', 'tiny')
  config.input.update(data_dir=text_config.input.data_dir, context=16)
  config.input.eval_split = 'test[:1024]'
  config.model.update(
    hidden_size=16, depth=1, num_heads=2, num_kv_heads=1, head_size=8, mlp_size=16,
    num_experts=2, experts_per_token=1,
  )  # fmt: skip
  config.num_steps, config.checkpoint_every, config.log_every = 8, 4, 2
  config.batch_size, config.search.num_samples = 8, 2
  config.search.attention_products = True
  return config


def test_search(decoder_config, tmp_path):
  result = loop.run(decoder_config, tmp_path)
  assert 4 < result['eval']['bits_per_byte'] < 9  # log2(256) is 8
  assert result['cost'] <= result['target'] * (1 + 1e-6)
  layers = {'attention/query', 'attention/key', 'attention/value', 'attention/out',
            'attention/qk', 'attention/av', 'mlp/router', 'mlp/gate', 'mlp/up',
            'mlp/down'}  # fmt: skip
  paths = (f'blocks/0/{n}' for n in layers)
  assert set(result['formats']) == {'embedding/embedding', *paths}
  deployed = deployment.make_deployment(*evaluation.finished_run(tmp_path))
  report = exporter.export(deployed, 'stablehlo', tmp_path / 'export')
  assert report['eval']['loss'] == pytest.approx(result['eval']['loss'], rel=0.01)
  # The table is looked up in floats, and multiplied in codes.
  assert 'embedding/embedding' in report['unquantized']
  config = decoder_config.copy_and_resolve_references()
  config.mode = 'eval'
  config.formats, config.checkpoint = 'int8', str(tmp_path)
  evaluated = loop.run(config, tmp_path / 'evaluated')
  assert evaluated['eval']['num_examples'] == 1_024


def test_sizes_that_do_not_fit(decoder_config):
  config = decoder_config.copy_and_resolve_references()
  config.model.num_kv_heads = 3
  with pytest.raises(ConfigError, match='num_heads=2: expected a multiple of'):
    discover_layers(config)


def test_networks_without_attention_products(text_config):
  config = text_config.copy_and_resolve_references()
  config.search.attention_products = True
  with pytest.raises(ConfigError, match="expected False for model 'transformer_lm'"):
    discover_layers(config)


def test_no_cache_without_attention_products(decoder_config):
  config = decoder_config.copy_and_resolve_references()
  config.search.update(cap_cost_model='kv_cache', attention_products=False)
  (problem,) = validate(resolve(config), num_devices=1)
  assert problem.startswith('search.cap_cost_model=kv_cache: expected search.attention')


@pytest.mark.parametrize(
  'variant, num_devices, params',
  [
    ('1b', 64, 1_235_814_400 - (128_256 - 256) * 2_048),
    ('7b', 64, 7_751_248_896 + 256 * 3_072),
    ('tiny', 1, None),
  ],
)
def test_recipes_are_valid(variant, num_devices, params):
  config = resolve(load_config('gemma_like', variant))
  assert validate(config, num_devices) == []
  if params:
    assert build_model(config).model.num_params() == params


def test_unknown_variant():
  with pytest.raises(ValueError, match="unknown variant 'stdlib': expected one of"):
    load_config('gemma_like', 'stdlib')
