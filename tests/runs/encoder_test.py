"""A run of an encoder, from random weights and from a checkpoint of Hugging Face."""

import json

import bert_reference
from conftest import load_config
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file
from scipy import special

from fliqs_jax.errors import ConfigError
from fliqs_jax.models import bert_checkpoint
from fliqs_jax.models.encoder import MaskedLanguageModel
from fliqs_jax.runs import loop, pretrained
from fliqs_jax.runs.config import resolve
from fliqs_jax.runs.validation import validate

BERT = {
  'model_type': 'bert', 'hidden_act': 'gelu', 'position_embedding_type': 'absolute',
  'layer_norm_eps': 1e-12, 'vocab_size': 256, 'hidden_size': 16,
  'num_hidden_layers': 1, 'num_attention_heads': 2, 'intermediate_size': 24,
  'max_position_embeddings': 20, 'type_vocab_size': 2,
}  # fmt: skip
HEAD = 'cls.predictions'


def drawn():
  """Returns the tensors of a BERT that predicts hidden tokens, by name."""
  rng = np.random.default_rng(0)
  tensors = bert_reference.draw(rng, 16, 24, 1, 256, 20)
  head = {
    'transform.dense.weight': (16, 16), 'transform.dense.bias': (16,),
    'transform.LayerNorm.weight': (16,), 'transform.LayerNorm.bias': (16,),
    'bias': (256,),
  }  # fmt: skip
  return {
    **{f'bert.{name}': tensor for name, tensor in tensors.items()},
    **{f'{HEAD}.{n}': rng.normal(size=shape).astype('f') for n, shape in head.items()},
  }


@pytest.fixture
def config(text_config, tmp_path):
  """A search that takes seconds from a BERT in the folder `there`."""
  config = load_config('bert_like', 'tiny')
  config.input.update(data_dir=text_config.input.data_dir, context=16)
  config.input.eval_split = 'test[:1024]'
  config.model.update(hidden_size=16, depth=1, num_heads=2, mlp_size=24, max_tokens=20)
  config.num_steps, config.checkpoint_every, config.log_every = 6, 3, 2
  config.batch_size, config.search.num_samples = 8, 2
  config.search.strategy = 'policy_gradient'
  config.init_from = str(write(tmp_path / 'there', drawn()))
  return config


def write(folder, tensors, **changes):
  folder.mkdir(exist_ok=True)
  (folder / 'config.json').write_text(json.dumps({**BERT, **changes}))
  save_file(tensors, folder / 'model.safetensors')
  return folder


def test_logits_are_those_of_the_equations():
  tensors = drawn()
  model = MaskedLanguageModel(**bert_checkpoint.sizes(BERT), rngs=nnx.Rngs(0))
  params = bert_checkpoint.params(BERT, tensors)
  graph, state = nnx.split(model)
  assert jax.tree.structure(nnx.to_pure_dict(state)) == jax.tree.structure(
    {**params, 'encoder': {**params['encoder'], 'blocks': {
      int(i): block for i, block in params['encoder']['blocks'].items()}}}
  )  # fmt: skip
  leaves = jax.tree.leaves(params)
  model = nnx.merge(
    graph, jax.tree.structure(state).unflatten(map(jnp.asarray, leaves))
  )
  tokens = np.array([5, 200, 26, 7])
  bare = {n.removeprefix('bert.'): t for n, t in tensors.items()}
  x = bert_reference.outputs(bare, 2, tokens)
  weight = lambda name: np.asarray(tensors[f'{HEAD}.transform.{name}'], np.float64)
  x = x @ weight('dense.weight').T + weight('dense.bias')
  x = x * (1 + special.erf(x / np.sqrt(2))) / 2
  x = x - x.mean(1, keepdims=True)
  x = x / np.sqrt((x**2).mean(1, keepdims=True) + 1e-12)
  x = x * weight('LayerNorm.weight') + weight('LayerNorm.bias')
  embedding = bare['embeddings.word_embeddings.weight'].astype(np.float64)
  expected = x @ embedding.T + tensors[f'{HEAD}.bias']
  found = model(jnp.asarray(tokens)[None])[0]
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=2e-4)
  # What fills up a text is not seen.
  padded = model(jnp.asarray([*tokens, 0, 0])[None])[0, : len(tokens)]
  np.testing.assert_allclose(padded, found, rtol=1e-4, atol=1e-4)


def test_a_search_from_a_checkpoint(config, tmp_path):
  result = loop.run(config, tmp_path / 'run')
  assert result['eval']['num_examples'] == 1_024
  assert set(result['formats']) >= {
    'encoder/blocks/0/query', 'encoder/blocks/0/down', 'transform',
    'encoder/tokens/embedding',
  }  # fmt: skip


def test_what_does_not_fit_is_named(config, tmp_path):
  config.model.update(mlp_size=32, max_tokens=30)
  with pytest.raises(ConfigError) as error:
    loop.run(config, tmp_path / 'run')
  (problem,) = error.value.problems
  assert problem.endswith(
    'is of another network: model.mlp_size=32 where it has 24, model.max_tokens=30 '
    'where it has 20'
  )


def test_leaves_that_do_not_fit_are_named(config, tmp_path):
  tensors = drawn()
  del tensors[f'{HEAD}.bias']
  name = 'bert.encoder.layer.0.intermediate.dense.weight'
  write(tmp_path / 'there', {**tensors, name: tensors[name].T.copy()})
  with pytest.raises(ConfigError) as error:
    loop.run(config, tmp_path / 'run')
  assert error.value.problems == [
    'variables to start from: params/bias is missing: expected shape (256,)',
    'variables to start from: params/encoder/blocks/0/up/kernel has shape (24, 16): '
    'expected shape (16, 24)',
  ]


def test_another_model_is_named(config, tmp_path):
  config.model = {'name': 'transformer_lm', 'width': 1.0}
  with pytest.raises(ConfigError, match="expected model.name=encoder, found 'transf"):
    loop.run(config, tmp_path / 'run')


def test_a_config_that_is_no_bert(config, tmp_path):
  write(tmp_path / 'there', drawn(), hidden_act='relu')
  with pytest.raises(ConfigError, match="there': config of a BERT: hidden_act"):
    pretrained.read(config.init_from)


@pytest.mark.parametrize('variant', ['base', 'tiny'])
def test_the_configs_are_valid(variant):
  assert validate(resolve(load_config('bert_like', variant)), 1) == []


def test_no_other_variant():
  with pytest.raises(ValueError, match="unknown variant 'large'"):
    load_config('bert_like', 'large')
