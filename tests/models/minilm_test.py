"""A network that others trained, all-MiniLM-L6-v2, by its published similarities."""

import bert_reference
from flax import nnx
import minilm_package
import numpy as np
import pytest

from fliqs_jax.models import bert_checkpoint

pytestmark = pytest.mark.skipif(
  not minilm_package.is_installed(), reason=f'not installed: {minilm_package.INSTALL}'
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
def embeddings(package):
  """Returns the embeddings float32[3, 384] of the sentences, their tokens and mask."""
  config, tensors, tokenizer = package
  tokens, mask = minilm_package.tokenize(tokenizer, SENTENCES, length=16)
  model = minilm_package.sentence_encoder(config, tensors)
  embed = nnx.jit(lambda model, tokens, mask: model(tokens, mask))
  return embed(model, tokens, mask), tokens, mask


def test_similarities_are_those_that_are_published(embeddings):
  found, _, _ = embeddings
  np.testing.assert_allclose(found @ found.T, SIMILARITIES, atol=5.1e-5)


def test_embeddings_are_those_of_the_equations(package, embeddings):
  config, tensors, _ = package
  heads = bert_checkpoint.sizes(config)['num_heads']
  for row, tokens, mask in zip(*embeddings, strict=True):
    expected = bert_reference.embedding(tensors, heads, tokens[: mask.sum()])
    np.testing.assert_allclose(row, expected, atol=1e-6)
