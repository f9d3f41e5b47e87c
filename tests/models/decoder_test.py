"""The decoder: parameters as published, and its parts against arithmetic."""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fliqs_jax import models
from fliqs_jax.errors import ConfigError
from fliqs_jax.models import decoder
from fliqs_jax.models.decoder import Decoder
from fliqs_jax.models.experts import Experts
from fliqs_jax.search.cost_models import get_cost_model
from fliqs_jax.search.space import build_space

SIZES = {
  'vocabulary_size': 20,
  'hidden_size': 16,
  'depth': 2,
  'num_heads': 4,
  'num_kv_heads': 2,
  'head_size': 6,
  'mlp_size': 24,
}
CONTEXT = 10
WITH_EXPERTS = {'num_experts': 4, 'experts_per_token': 2}


def shapes(**sizes):
  return nnx.eval_shape(lambda: Decoder(**sizes, rngs=nnx.Rngs(0)))


@functools.cache
def drawn(**changed):
  return nnx.jit(lambda: Decoder(**{**SIZES, **changed}, rngs=nnx.Rngs(0)))()


@nnx.jit
def logits(model, tokens):
  return model(tokens)


@pytest.mark.parametrize(
  'sizes, published',
  [
    # Of the embeddings and of all else: arXiv 2403.08295, Table 2.
    (decoder.GEMMA_2B, 524_550_144 + 1_981_884_416),
    (decoder.GEMMA_7B, 786_825_216 + 7_751_248_896),
    # Elements of the checkpoints on Hugging Face.
    (decoder.LLAMA_2_7B, 6_738_415_616),
    (decoder.LLAMA_3_2_1B, 1_235_814_400),
    (decoder.MIXTRAL_8X7B, 46_702_792_704),
  ],
)
def test_published_number_of_parameters(sizes, published):
  assert shapes(**sizes).num_params() == published


def test_published_number_of_active_parameters():
  # 12.9 billion: arXiv 2401.04088, Section 1.
  active = shapes(**decoder.MIXTRAL_8X7B).num_params(active=True)
  assert round(active / 1e9, 1) == 12.9
  one_of_eight = 3 * 4_096 * 14_336
  assert active == 46_702_792_704 - 32 * 6 * one_of_eight


@pytest.mark.parametrize('changed', [{}, {**WITH_EXPERTS, 'capacity_factor': 1.0}])
def test_logits_do_not_depend_on_later_tokens(changed):
  tokens = jax.random.randint(jax.random.key(1), (2, CONTEXT), 0, 20)
  place = 6
  after = tokens.at[:, place].add(1) % 20
  model = drawn(**changed)
  before, after = logits(model, tokens), logits(model, after)
  np.testing.assert_allclose(before[:, :place], after[:, :place], atol=1e-6)
  assert (before[:, place] != after[:, place]).any(axis=-1).all()


def test_rotated_products_depend_on_distances_alone():
  query, key = jax.random.normal(jax.random.key(0), (2, 1, 1, 3, 8))
  tokens = lambda x: jnp.broadcast_to(x, (1, 12, 3, 8))
  rotated = [decoder.rotate(tokens(x), jnp.arange(12)) for x in (query, key)]
  products = jnp.einsum('bqnh,bknh->nqk', *rotated)
  for distance in range(-11, 12):
    diagonal = np.array([np.diag(head, distance) for head in products])
    np.testing.assert_allclose(diagonal, diagonal[:, :1].repeat(12 - abs(distance), 1),
                               atol=1e-5)  # fmt: skip
  np.testing.assert_allclose(rotated[0][:, 0], query[0], atol=1e-6)


def test_rotation_of_pairs_is_that_of_complex_numbers():
  x = np.random.default_rng(0).normal(size=(1, 5, 2, 6)).astype(np.float32)
  angles = np.arange(5)[:, None] * 100.0 ** -(np.arange(3) / 3)
  complex_x = (x[..., :3] + 1j * x[..., 3:]) * np.exp(1j * angles)[:, None]
  expected = np.concatenate([complex_x.real, complex_x.imag], axis=-1)
  np.testing.assert_allclose(
    decoder.rotate(x, jnp.arange(5), base=100.0), expected, atol=1e-6
  )


def test_grouped_heads_are_repeated_ones():
  grouped, whole = drawn(), nnx.clone(drawn(num_kv_heads=4))
  nnx.update(whole.embedding, nnx.state(grouped.embedding))
  for block, own in zip(grouped.blocks, whole.blocks):
    for name in ('norm_attention', 'norm_mlp', 'mlp'):
      nnx.update(getattr(own, name), nnx.state(getattr(block, name)))
    for name in ('query', 'key', 'value', 'out'):
      kernel = getattr(block.attention, name).kernel[...]
      if name in ('key', 'value'):
        kernel = jnp.repeat(kernel.reshape(16, 2, 6), 2, axis=1).reshape(16, 24)
      getattr(own.attention, name).kernel[...] = kernel
  tokens = jax.random.randint(jax.random.key(1), (2, CONTEXT), 0, 20)
  np.testing.assert_allclose(logits(grouped, tokens), logits(whole, tokens), atol=1e-5)


def test_remat_changes_nothing():
  tokens = jax.random.randint(jax.random.key(1), (2, CONTEXT), 0, 20)
  loss = nnx.jit(nnx.value_and_grad(lambda model: jnp.mean(model(tokens)[..., 0])))
  (a, of_a), (b, of_b) = loss(drawn()), loss(drawn(remat=True))
  np.testing.assert_allclose(a, b, rtol=1e-5)
  close = functools.partial(np.testing.assert_allclose, atol=1e-5)
  jax.tree.map(close, nnx.to_pure_dict(of_a), nnx.to_pure_dict(of_b))


def make_experts(capacity_factor):
  return Experts(
    8, 12, 4, 2, capacity_factor, jax.nn.silu, jnp.float32, rngs=nnx.Rngs(0)
  )


@pytest.mark.parametrize('capacity_factor', [4.0, 1.0, 0.5])
def test_experts_are_those_of_a_loop_over_tokens(capacity_factor):
  experts = make_experts(capacity_factor)
  x = np.random.default_rng(0).normal(size=(3, 6, 8)).astype(np.float32)
  expected, lost = np.zeros_like(x), 0
  silu = lambda a: a / (1 + np.exp(-a))
  gate, up, down = (
    np.asarray(getattr(experts, n).kernel[...]) for n in ('gate', 'up', 'down')
  )
  for text in range(3):
    places = dict.fromkeys(range(4), min(int(np.ceil(3 * capacity_factor)), 6))
    for token in range(6):
      scores = x[text, token] @ np.asarray(experts.router.kernel[...])
      best = np.argsort(-scores)[:2]
      weights = np.exp(scores[best]) / np.exp(scores[best]).sum()
      for weight, e in zip(weights, best):
        places[e] -= 1
        if places[e] < 0:
          lost += 1
          continue
        hidden = silu(x[text, token] @ gate[e]) * (x[text, token] @ up[e])
        expected[text, token] += weight * (hidden @ down[e])
  np.testing.assert_allclose(jax.jit(experts.__call__)(x), expected, atol=1e-5)
  assert (lost == 0) == (capacity_factor == 4.0)


def layers_of(**changed):
  options = {**SIZES, **changed}
  network = models.create_model('decoder', options.pop('vocabulary_size'), **options)
  tokens = jax.ShapeDtypeStruct((1, CONTEXT), jnp.int32)
  return {layer.path: layer for layer in network.coverage(tokens, train=False).layers}


def test_layers_and_macs():
  macs = {'attention/query': 16 * 24, 'attention/key': 16 * 12, 'mlp/gate': 16 * 24,
          'attention/value': 16 * 12, 'attention/out': 24 * 16, 'mlp/up': 16 * 24,
          'mlp/down': 24 * 16}  # fmt: skip
  expected = {
    f'blocks/{block}/{name}': CONTEXT * count
    for block in (0, 1)
    for name, count in macs.items()
  }
  expected['embedding/embedding'] = CONTEXT * 16 * 20
  assert {path: layer.macs for path, layer in layers_of().items()} == expected
  untied = layers_of(tied=False)
  assert (
    untied['head'].macs == CONTEXT * 16 * 20 and 'embedding/embedding' not in untied
  )


def test_active_experts_count_and_all_are_stored():
  layers = layers_of(**WITH_EXPERTS, capacity_factor=1.0)
  one = 16 * 24
  for name in ('gate', 'up', 'down'):
    layer = layers[f'blocks/1/mlp/{name}']
    assert layer.macs == CONTEXT * 2 * one  # of the four experts
    assert layer.params == 4 * one
  assert layers['blocks/1/mlp/router'].macs == CONTEXT * 16 * 4


def test_cache_of_keys_and_values_by_hand():
  layers = tuple(layers_of(attention_products=True).values())
  values = CONTEXT * 2 * 6  # of the keys of one block, for 2 heads of 6 channels
  cost_model = get_cost_model('kv_cache')
  assert cost_model.uniform(layers, 'int4') == 2 * 2 * values * 4 / 8
  space = build_space(layers, ('int4', 'int8'), operands='separate')
  choices = np.zeros(len(space.decisions), np.int32)
  names = [decision.name for decision in space.decisions]
  choices[names.index('blocks/1/attention/av:weights')] = 1
  assert cost_model(space, choices) == (3 * values * 4 + values * 8) / 8
  # The query and the attention's weights are not kept.
  choices[names.index('blocks/1/attention/av:activations')] = 1
  assert cost_model(space, choices) == (3 * values * 4 + values * 8) / 8


@pytest.mark.parametrize(
  'changed, message',
  [
    ({'num_kv_heads': 3}, 'num_heads=4: expected a multiple of num_kv_heads=3'),
    ({'head_size': 5}, 'head_size=5: expected an even number'),
    ({'activation': 'relu'}, "activation='relu'"),
    ({'num_experts': 1}, 'experts_per_token=2: expected one from 1 to num_experts=1'),
    ({'width': 0.01}, 'hidden_size 0 and mlp_size 0'),
  ],
)
def test_sizes_that_do_not_fit(changed, message):
  with pytest.raises(ConfigError, match=message):
    shapes(**{**SIZES, **changed})


def test_input_that_does_not_fit():
  with pytest.raises(ConfigError, match='input.context'):
    drawn()(np.zeros((1, 8, 8, 1), np.float32))
