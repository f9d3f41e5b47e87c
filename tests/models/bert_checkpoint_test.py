"""Checkpoints of BERT: outputs against NumPy, and leaves that do not fit."""

import re

import bert_reference
from flax import nnx
import jax
import numpy as np
import pytest

from fliqs_jax.errors import ConfigError
from fliqs_jax.models import bert_checkpoint
from fliqs_jax.models.encoder import Encoder, SentenceEncoder

CONFIG = {
  'model_type': 'bert',
  'hidden_act': 'gelu',
  'layer_norm_eps': 1e-12,
  'vocab_size': 20,
  'hidden_size': 16,
  'num_hidden_layers': 2,
  'num_attention_heads': 4,
  'intermediate_size': 24,
  'max_position_embeddings': 8,
  'type_vocab_size': 2,
}


@pytest.fixture(scope='module')
def tensors():
  rng = np.random.default_rng(0)
  return bert_reference.draw(rng, hidden=16, mlp=24, depth=2, values=20, length=8)


@pytest.fixture(scope='module')
def make():
  """Makes an encoder, compiled once."""
  options = bert_checkpoint.sizes(CONFIG)
  return nnx.jit(lambda: Encoder(**options, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize('prefix', ['', 'bert.'])
def test_outputs_are_those_of_numpy(tensors, make, prefix):
  encoder = make()
  given = {f'{prefix}{name}': tensor for name, tensor in tensors.items()}
  bert_checkpoint.load(encoder, {**given, **({'cls.bias': 1} if prefix else {})})
  tokens = np.random.default_rng(1).integers(0, 20, (3, 7))
  counts = np.array([7, 4, 1])
  mask = np.arange(7) < counts[:, None]
  forward = nnx.jit(lambda model: (model.encoder(tokens, mask), model(tokens, mask)))
  outputs, embeddings = forward(SentenceEncoder(encoder))
  for row, count in enumerate(counts):
    text = tokens[row, :count]
    expected = bert_reference.outputs(tensors, 4, text)
    np.testing.assert_allclose(outputs[row, :count], expected, atol=2e-5)
    expected = bert_reference.embedding(tensors, 4, text)
    np.testing.assert_allclose(embeddings[row], expected, atol=2e-6)


def test_leaves_that_do_not_fit_are_named_in_one_line(tensors, make):
  query = 'encoder.layer.1.attention.self.query'
  up = 'encoder.layer.0.intermediate.dense.weight'
  given = {**tensors, up: tensors[up].T, 'encoder.extra': np.zeros(3)}
  del given[f'{query}.bias']
  encoder = make()
  before = jax.tree.leaves(nnx.state(encoder))
  with pytest.raises(ConfigError) as error:
    bert_checkpoint.load(encoder, given)
  assert error.value.problems == [
    f'not the checkpoint of this encoder: {query}.bias is missing; encoder.extra is '
    f'unknown; {up} has shape (16, 24) where (24, 16) is expected'
  ]
  for leaf, own in zip(jax.tree.leaves(nnx.state(encoder)), before, strict=True):
    np.testing.assert_array_equal(leaf, own)


@pytest.mark.parametrize(
  'changed, message',
  [
    ({'hidden_act': 'relu'}, "hidden_act is 'relu', expected 'gelu'"),
    ({'model_type': 'llama'}, "model_type is 'llama', expected 'bert'"),
    ({'vocab_size': None}, 'vocab_size is missing'),
  ],
)
def test_configs_of_other_networks(changed, message):
  config = {**CONFIG, **changed}
  config = {name: value for name, value in config.items() if value is not None}
  with pytest.raises(ConfigError, match=f'^config of a BERT: {re.escape(message)}$'):
    bert_checkpoint.sizes(config)
