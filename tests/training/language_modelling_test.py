"""The task of language modelling, against numbers computed by hand."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from fliqs_jax.training import language_modelling

# Two windows of three bytes among four values; the second ends early.
BATCH = {'tokens': np.array([[1, 2, 3], [2, 1, 0]], np.uint8), 'mask': np.ones(2, bool)}
# The probability of each next byte: 1/2 and 1/8; then 1/4, and one that is not counted.
LOGITS = jnp.log(
  jnp.array(
    [
      [[1 / 8, 1 / 4, 1 / 2, 1 / 8], [1 / 4, 1 / 2, 1 / 8, 1 / 8]],
      [[1 / 4, 1 / 4, 1 / 4, 1 / 4], [1e-6, 1 / 2, 1 / 4, 1 / 4]],
    ]
  )
)


def test_bits_of_the_bytes_that_a_text_has():
  task = language_modelling.language_modelling()
  bits = [(1 + 3) / 2, 2]
  evaluation = task.evaluation(LOGITS, BATCH)
  np.testing.assert_allclose(evaluation['bits_per_byte'], bits, rtol=1e-6)
  nats = np.multiply(bits, math.log(2))
  np.testing.assert_allclose(evaluation['loss'], nats, rtol=1e-6)
  np.testing.assert_allclose(task.loss(LOGITS, BATCH), nats, rtol=1e-6)
  np.testing.assert_allclose(task.quality(LOGITS, BATCH), np.negative(bits), rtol=1e-6)


def test_a_window_without_a_byte_to_predict_counts_nothing():
  batch = {'tokens': np.array([[1, 0, 0]], np.uint8)}
  loss = language_modelling.cross_entropy(LOGITS[:1], batch)
  assert loss.tolist() == [pytest.approx(0)]


def test_the_network_sees_all_bytes_but_the_last():
  arguments = language_modelling.language_modelling().arguments(BATCH, True)
  assert arguments.args[0].tolist() == [[1, 2], [2, 1]]
  assert arguments.args[0].dtype == jnp.int32
