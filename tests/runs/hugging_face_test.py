"""Checkpoints of Llama and Gemma: outputs against NumPy, and files that do not fit."""

import json

from conftest import load_config
from flax import nnx
import jax
import llama_reference
import numpy as np
import pytest
from safetensors.numpy import save_file

from fliqs_jax.errors import ConfigError
from fliqs_jax.models import llama_checkpoint
from fliqs_jax.models.decoder import Decoder
from fliqs_jax.nnx import Searchable
from fliqs_jax.runs import hugging_face, preparation, pretrained
from fliqs_jax.runs.config import resolve

LLAMA = {
  'model_type': 'llama',
  'hidden_act': 'silu',
  'vocab_size': 256,
  'hidden_size': 16,
  'num_hidden_layers': 2,
  'num_attention_heads': 4,
  'num_key_value_heads': 2,
  'head_dim': 6,
  'intermediate_size': 24,
  'rms_norm_eps': 1e-5,
  'rope_theta': 500.0,
  'tie_word_embeddings': False,
}
GEMMA = {
  **LLAMA,
  'model_type': 'gemma',
  'hidden_act': 'gelu',
  'rms_norm_eps': 1e-6,
  'tie_word_embeddings': True,
}


def write(folder, config, weights, shards=1):
  """Writes a checkpoint as Hugging Face does, in one file or several."""
  folder.mkdir(exist_ok=True)
  (folder / 'config.json').write_text(json.dumps(config))
  names = sorted(weights)
  for shard in range(shards):
    part = {name: weights[name] for name in names[shard::shards]}
    save_file(part, folder / f'model-{shard + 1:05}-of-{shards:05}.safetensors')
  return folder


def drawn(config):
  return llama_reference.draw(np.random.default_rng(0), config)


@pytest.fixture
def run_config(tmp_path):
  """A search that starts from a Gemma in the folder `there`, which is not written."""
  config = load_config('gemma_like', 'tiny')
  sizes = llama_checkpoint.sizes(GEMMA)
  del sizes['vocabulary_size']
  config.model = {'name': 'decoder', 'width': 1.0, **sizes}
  config.init_from = str(tmp_path / 'there')
  return config


def started(config):
  """Returns the variables that a run would start from."""
  return preparation.prepare(resolve(config), preparation.epath.Path('/nowhere')).start


@pytest.mark.parametrize('config, shards', [(LLAMA, 1), (GEMMA, 3)])
def test_logits_are_those_of_numpy(config, shards, tmp_path):
  weights = drawn(config)
  folder = write(tmp_path / 'there', config, weights, shards)
  variables = pretrained.read(str(folder))
  sizes = llama_checkpoint.sizes(config)
  model = nnx.eval_shape(lambda: Decoder(**sizes, rngs=nnx.Rngs(0)))
  tokens = np.random.default_rng(1).integers(0, 256, (2, 9))
  outputs = jax.jit(Searchable(model, {}).apply)(variables, tokens)
  for row, text in zip(outputs, tokens):
    expected = llama_reference.logits(weights, config, text)
    np.testing.assert_allclose(row, expected, atol=1e-4 * np.abs(expected).max())


def test_a_decoder_in_python_gets_the_weights():
  weights, sizes = drawn(GEMMA), llama_checkpoint.sizes(GEMMA)
  decoder = nnx.jit(lambda: Decoder(**sizes, rngs=nnx.Rngs(0)))()
  llama_checkpoint.load(decoder, GEMMA, weights)
  tokens = np.random.default_rng(1).integers(0, 256, (1, 9))
  (row,) = nnx.jit(lambda model: model(tokens))(decoder)
  expected = llama_reference.logits(weights, GEMMA, tokens[0])
  np.testing.assert_allclose(row, expected, atol=1e-4 * np.abs(expected).max())


def test_leaves_of_another_decoder_are_named_in_one_line():
  sizes = {**llama_checkpoint.sizes(GEMMA), 'depth': 1, 'mlp_size': 20}
  decoder = nnx.eval_shape(lambda: Decoder(**sizes, rngs=nnx.Rngs(0)))
  weights = drawn(GEMMA)
  del weights['model.norm.weight']
  with pytest.raises(ConfigError) as error:
    llama_checkpoint.load(decoder, GEMMA, weights)
  (problem,) = error.value.problems
  assert 'norm/scale is missing; ' in problem
  assert '; blocks/1/mlp/gate/kernel is unknown; ' in problem
  assert 'blocks/0/mlp/up/kernel has shape (16, 24) where (16, 20) is' in problem


def test_a_run_starts_from_it(run_config, data_dir, tmp_path):
  run_config.input.data_dir = str(data_dir)
  weights = drawn(GEMMA)
  write(tmp_path / 'there', GEMMA, weights)
  start = started(run_config)
  np.testing.assert_array_equal(
    start['params']['blocks']['1']['mlp']['down']['kernel'],
    weights['model.layers.1.mlp.down_proj.weight'].T,
  )


def problems(config):
  """Returns what stands in the way of a run from a checkpoint."""
  with pytest.raises(ConfigError) as error:
    started(config)
  return error.value.problems


def test_another_network_is_named_in_one_line(run_config, data_dir, tmp_path):
  run_config.input.data_dir = str(data_dir)
  write(tmp_path / 'there', GEMMA, drawn(GEMMA))
  run_config.model.rotary_base = 10_000.0
  run_config.model.norm_epsilon = 1e-5
  (problem,) = problems(run_config)
  assert problem.endswith(
    'is of another network: model.rotary_base=10000.0 where it has 500.0, '
    'model.norm_epsilon=1e-05 where it has 1e-06'
  )


def test_leaves_that_do_not_fit_are_named(run_config, data_dir, tmp_path):
  run_config.input.data_dir = str(data_dir)
  weights = drawn(GEMMA)
  del weights['model.norm.weight']
  up = 'model.layers.0.mlp.up_proj.weight'
  write(tmp_path / 'there', GEMMA, {**weights, up: weights[up].T})
  assert problems(run_config) == [
    'variables to start from: params/blocks/0/mlp/up/kernel has shape (24, 16): '
    'expected shape (16, 24)',
    'variables to start from: params/norm/scale is missing: expected shape (16,)',
  ]


@pytest.mark.parametrize(
  'changed, message',
  [
    ({'model_type': 'gpt2'}, "model_type is 'gpt2', expected one of llama, gemma"),
    ({'rope_scaling': {'factor': 8}}, "rope_scaling is {'factor': 8}, expected None"),
    ({'attention_bias': True}, 'attention_bias is True, expected False'),
  ],
)
def test_configs_of_other_networks(changed, message, tmp_path):
  folder = write(tmp_path / 'there', {**LLAMA, **changed}, drawn(LLAMA))
  with pytest.raises(ConfigError) as error:
    hugging_face.read(preparation.epath.Path(folder))
  (problem,) = error.value.problems
  assert message in problem and str(folder) in problem


def test_files_of_something_else(tmp_path):
  folder = write(tmp_path / 'there', LLAMA, {**drawn(LLAMA), 'h.0.attn': np.zeros(3)})
  with pytest.raises(ConfigError, match='not the checkpoint of a llama: h.0.attn unk'):
    pretrained.read(str(folder))
  (folder / 'model-00001-of-00001.safetensors').write_bytes(b'no tensors')
  with pytest.raises(ConfigError, match='cannot be read'):
    pretrained.read(str(folder))
