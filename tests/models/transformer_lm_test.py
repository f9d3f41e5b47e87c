"""The language model: parameters and costs by hand, and what a token may see."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fliqs_jax import models
from fliqs_jax.errors import ConfigError
from fliqs_jax.linen.discovery import discover

HIDDEN, DEPTH, HEADS, CONTEXT, VALUES = 48, 3, 4, 48, 256
TOKENS = jax.ShapeDtypeStruct((1, CONTEXT), jnp.int32)
LAYERS = [
  *(
    f'block{block}/{layer}'
    for block in (1, 2, 3)
    for layer in (
      'attention/query', 'attention/key', 'attention/value', 'attention/out', 'up',
      'down',
    )
  ),
  'head',
]  # fmt: skip


def make(quantized=True, **options):
  options = {'hidden_size': HIDDEN, 'depth': DEPTH, 'num_heads': HEADS, **options}
  return models.create_model('transformer_lm', VALUES, quantized, **options)


@functools.cache
def drawn():
  """The float network and its variables."""
  model = make(quantized=False)
  return model, model.init(jax.random.key(0), np.zeros((1, CONTEXT), int), train=False)


def test_parameters():
  square, norm = HIDDEN * HIDDEN + HIDDEN, 2 * HIDDEN
  mlp = HIDDEN * 4 * HIDDEN + 4 * HIDDEN + 4 * HIDDEN * HIDDEN + HIDDEN
  expected = DEPTH * (4 * square + mlp + 2 * norm) + norm
  expected += VALUES * HIDDEN + CONTEXT * HIDDEN + HIDDEN * VALUES + VALUES
  leaves = jax.tree.leaves(drawn()[1]['params'])
  assert sum(leaf.size for leaf in leaves) == expected == 112_048


def test_layers_and_macs():
  layers = discover(make(), TOKENS, train=False)
  assert sorted(layer.path for layer in layers) == sorted(LAYERS)
  assert len(layers) == 19 and layers[-1].path == 'head'
  inputs_times_outputs = {'up': 4, 'down': 4, 'head': VALUES / HIDDEN}
  for layer in layers:
    factor = inputs_times_outputs.get(layer.path.rpartition('/')[2], 1)
    assert layer.macs == CONTEXT * HIDDEN * HIDDEN * factor
  assert sum(layer.macs for layer in layers) == CONTEXT * (3 * 12 * 48**2 + 48 * 256)


def test_width_multiplies_the_hidden_size():
  (query,) = (
    layer
    for layer in discover(make(width=0.5), TOKENS, train=False)
    if layer.path == 'block1/attention/query'
  )
  assert query.kernel_shape == (24, 24)


def test_logits_do_not_depend_on_later_tokens():
  model, variables = drawn()
  tokens = jax.random.randint(jax.random.key(1), (2, CONTEXT), 0, VALUES)
  place = 20
  changed = tokens.at[:, place].add(1) % VALUES
  apply = jax.jit(functools.partial(model.apply, train=False))
  before, after = apply(variables, tokens), apply(variables, changed)
  assert before.shape == (2, CONTEXT, VALUES)
  np.testing.assert_array_equal(before[:, :place], after[:, :place])
  assert (before[:, place:] != after[:, place:]).any(axis=(0, 2)).all()


def test_computes_in_its_dtype():
  model = make(quantized=False, dtype=jnp.bfloat16)
  tokens = np.zeros((2, 8), np.int32)
  variables = jax.eval_shape(
    functools.partial(model.init, train=False), jax.random.key(0), tokens
  )
  jaxpr = jax.make_jaxpr(functools.partial(model.apply, train=False))(variables, tokens)
  products = {
    equation.outvars[0].aval.dtype
    for equation in jaxpr.eqns
    if equation.primitive.name == 'dot_general'
  }
  assert products == {jnp.dtype('bfloat16')}
  assert jaxpr.out_avals[0].dtype == jnp.float32


@pytest.mark.parametrize(
  'options, example, words',
  [
    ({'width': 0.3}, TOKENS, ('hidden size 14', '4 heads')),
    ({}, jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32), ('input.context',)),
  ],
)
def test_what_does_not_fit_is_named(options, example, words):
  with pytest.raises(ConfigError) as error:
    discover(make(**options), example, train=False)
  for word in words:
    assert word in str(error.value)
