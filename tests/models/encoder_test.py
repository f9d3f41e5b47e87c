"""The encoder: its parameters and costs, and what padding changes."""

import functools

from flax import nnx
import jax
import numpy as np
import pytest

import fliqs_jax
from fliqs_jax.errors import ConfigError
from fliqs_jax.models.encoder import Encoder, SentenceEncoder

SIZES = {
  'vocabulary_size': 20,
  'hidden_size': 16,
  'depth': 2,
  'num_heads': 4,
  'mlp_size': 24,
  'max_tokens': 8,
}


@functools.cache
def drawn():
  return nnx.jit(lambda: SentenceEncoder(Encoder(**SIZES, rngs=nnx.Rngs(0))))()


@nnx.jit
def embed(model, tokens, mask):
  return model(tokens, mask)


def texts(length=6, counts=(6, 4, 0)):
  """Returns tokens and the mask of texts of so many tokens."""
  tokens = np.random.default_rng(1).integers(0, 20, (len(counts), length))
  return tokens, (np.arange(length) < np.array(counts)[:, None]).astype(int)


def test_published_number_of_parameters():
  # https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2 has 22.7 million, of
  # which 384 * 385 are those of a pooler that the embedding does not use.
  model = nnx.eval_shape(lambda: Encoder(rngs=nnx.Rngs(0)))
  sizes = [np.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))]
  assert sum(sizes) == 22_713_216 - 384 * 385


def test_dense_layers_are_searched():
  layers = fliqs_jax.make_searchable(drawn()).coverage(*texts(counts=(6,))).layers
  macs = {'query': 256, 'key': 256, 'value': 256, 'out': 256, 'up': 384, 'down': 384}
  assert {layer.path: layer.macs for layer in layers} == {
    f'encoder/blocks/{block}/{name}': 6 * count
    for block in (0, 1)
    for name, count in macs.items()
  }


def test_what_fills_a_text_up_changes_nothing():
  tokens, mask = texts()
  before = embed(drawn(), tokens, mask)
  changed = np.where(mask, tokens, 3)
  assert (changed != tokens).any()
  np.testing.assert_array_equal(embed(drawn(), changed, mask), before)
  alone = embed(drawn(), tokens[1:2, :4], mask[1:2, :4])
  np.testing.assert_allclose(alone[0], before[1], atol=1e-6)
  # A text without tokens has no direction.
  lengths = np.linalg.norm(before, axis=1)
  np.testing.assert_allclose(lengths, [1, 1, 0], rtol=1e-6)


def test_sizes_that_do_not_fit():
  with pytest.raises(ConfigError, match='hidden size 16: .* multiple of the 3 heads'):
    Encoder(**{**SIZES, 'num_heads': 3}, rngs=nnx.Rngs(0))
  with pytest.raises(ConfigError, match='9 tokens: expected at most 8'):
    drawn()(*texts(9, (9,)))
