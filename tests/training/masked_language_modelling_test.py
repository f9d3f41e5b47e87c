"""Masked language modelling: what is hidden, and what is counted."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fliqs_jax.training.masked_language_modelling import (
  MASK,
  is_hidden,
  masked_language_modelling,
)

TOKENS = np.random.default_rng(0).integers(1, 256, size=(64, 101)).astype(np.uint8)
TOKENS[0, 40:] = 0


def test_a_share_of_each_text_is_hidden_always_the_same():
  tokens = jnp.asarray(TOKENS, jnp.int32)
  hidden = np.asarray(is_hidden(tokens))
  np.testing.assert_array_equal(jax.jit(is_hidden)(tokens[::-1])[::-1], hidden)
  assert hidden[1:].mean() == pytest.approx(0.15, abs=0.02)
  assert not hidden[0, 40:].any() and hidden[0, :40].any()  # padding is not hidden
  assert len({row.tobytes() for row in hidden}) == len(hidden)


def test_what_is_hidden_is_not_seen_and_alone_counted():
  task, batch = masked_language_modelling(), {'tokens': jnp.asarray(TOKENS)}
  (seen,), kwargs = task.arguments(batch, True)
  tokens = TOKENS[:, :-1].astype(np.int32)
  hidden = np.asarray(is_hidden(jnp.asarray(tokens)))
  np.testing.assert_array_equal(seen, np.where(hidden, MASK, tokens))
  assert kwargs == {'train': True}
  # Sure of each hidden byte, and wrong on all others, which count for nothing.
  said = np.where(hidden, tokens, (tokens + 1) % 256)
  logits = 50.0 * np.eye(256, dtype=np.float32)[said]
  assert float(jnp.max(task.loss(logits, batch))) < 1e-6
  uniform = task.evaluation(np.zeros((*tokens.shape, 256), np.float32), batch)
  np.testing.assert_allclose(uniform['bits_per_byte'], 8.0, rtol=1e-6)
  np.testing.assert_allclose(uniform['loss'], 8.0 * math.log(2), rtol=1e-6)
