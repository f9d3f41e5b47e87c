"""Networks as the field writes them in NNX, unchanged: what is found, and its costs."""

import functools
import math

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fliqs_jax

# Sizes of the decoder: tokens, width, heads, their keys, their size, MLP, vocabulary
LENGTH, WIDTH, HEADS, KEYS, HEAD_SIZE, HIDDEN, VOCABULARY = 6, 8, 4, 2, 4, 16, 12


class RMSNorm(nnx.Module):
  def __init__(self, dim, *, rngs):
    self.scale = nnx.Param(nnx.initializers.zeros_init()(rngs.params(), dim))

  def __call__(self, x):
    variance = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(variance + 1e-6) * (1 + self.scale)


def apply_rope(x, positions):
  """Rotates the two halves of each head of `x [B, T, N, H]`, as Gemma does."""
  fraction = 2 * jnp.arange(x.shape[-1] // 2) / x.shape[-1]
  angles = positions[..., None, None] / 10_000**fraction
  first, second = jnp.split(x, 2, axis=-1)
  sin, cos = jnp.sin(angles), jnp.cos(angles)
  return jnp.concatenate(
    [first * cos - second * sin, second * cos + first * sin], axis=-1
  )


class Attention(nnx.Module):
  """Attention with fewer heads of keys and values than of queries."""

  def __init__(self, *, rngs):
    self.q_einsum = nnx.Einsum('BTD,NDH->BTNH', (HEADS, WIDTH, HEAD_SIZE), rngs=rngs)
    self.kv_einsum = nnx.Einsum(
      'BSD,CKDH->CBSKH', (2, KEYS, WIDTH, HEAD_SIZE), rngs=rngs
    )
    self.attn_vec_einsum = nnx.Einsum(
      'BTNH,NHD->BTD', (HEADS, HEAD_SIZE, WIDTH), rngs=rngs
    )

  def __call__(self, x):
    positions = jnp.arange(x.shape[1])[None]
    query = apply_rope(self.q_einsum(x), positions) * HEAD_SIZE**-0.5
    key, value = self.kv_einsum(x)
    key = apply_rope(key, positions)
    query = query.reshape(*query.shape[:2], KEYS, HEADS // KEYS, HEAD_SIZE)
    logits = jnp.einsum('BTKGH,BSKH->BTKGS', query, key)
    mask = jnp.tril(jnp.ones((x.shape[1], x.shape[1]), bool))[:, None, None]
    weights = jax.nn.softmax(jnp.where(mask, logits, -2e38), axis=-1)
    encoded = jnp.einsum('BTKGS,BSKH->BTKGH', weights, value)
    return self.attn_vec_einsum(encoded.reshape(*x.shape[:2], HEADS, HEAD_SIZE))


class FeedForward(nnx.Module):
  def __init__(self, *, rngs):
    linear = functools.partial(nnx.Linear, use_bias=False, rngs=rngs)
    self.gate_proj = linear(WIDTH, HIDDEN)
    self.up_proj = linear(WIDTH, HIDDEN)
    self.down_proj = linear(HIDDEN, WIDTH)

  def __call__(self, x):
    return self.down_proj(nnx.gelu(self.gate_proj(x)) * self.up_proj(x))


class Block(nnx.Module):
  def __init__(self, *, rngs):
    self.pre_attention_norm = RMSNorm(WIDTH, rngs=rngs)
    self.attn = Attention(rngs=rngs)
    self.pre_ffw_norm = RMSNorm(WIDTH, rngs=rngs)
    self.mlp = FeedForward(rngs=rngs)

  def __call__(self, x):
    x = x + self.attn(self.pre_attention_norm(x))
    return x + self.mlp(self.pre_ffw_norm(x))


class Decoder(nnx.Module):
  """A decoder in the manner of Gemma, whose embeddings are its last layer too."""

  def __init__(self, *, rngs):
    self.embedder = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
    self.layers = nnx.List([Block(rngs=rngs)])
    self.final_norm = RMSNorm(WIDTH, rngs=rngs)

  def __call__(self, tokens):
    x = self.embedder(tokens) * math.sqrt(WIDTH)
    for layer in self.layers:
      x = layer(x)
    return self.embedder.attend(self.final_norm(x))


class CNN(nnx.Module):
  """The convolutional network of Flax's tutorial on MNIST."""

  def __init__(self, *, rngs):
    self.conv1 = nnx.Conv(1, 32, kernel_size=(3, 3), rngs=rngs)
    self.batch_norm1 = nnx.BatchNorm(32, rngs=rngs)
    self.dropout1 = nnx.Dropout(rate=0.025)
    self.conv2 = nnx.Conv(32, 64, kernel_size=(3, 3), rngs=rngs)
    self.batch_norm2 = nnx.BatchNorm(64, rngs=rngs)
    self.avg_pool = functools.partial(nnx.avg_pool, window_shape=(2, 2), strides=(2, 2))
    self.linear1 = nnx.Linear(3136, 256, rngs=rngs)
    self.dropout2 = nnx.Dropout(rate=0.025)
    self.linear2 = nnx.Linear(256, 10, rngs=rngs)

  def __call__(self, x, rngs=None):
    x = self.dropout1(self.batch_norm1(self.conv1(x)), rngs=rngs)
    x = self.avg_pool(nnx.relu(x))
    x = self.avg_pool(nnx.relu(self.batch_norm2(self.conv2(x))))
    x = x.reshape(x.shape[0], -1)  # flatten
    x = nnx.relu(self.dropout2(self.linear1(x), rngs=rngs))
    return self.linear2(x)


class Loss(nnx.Variable):
  pass


class Encoder(nnx.Module):
  def __init__(self, din, dmid, dout, *, rngs):
    self.linear1 = nnx.Linear(din, dmid, rngs=rngs)
    self.linear_mean = nnx.Linear(dmid, dout, rngs=rngs)
    self.linear_std = nnx.Linear(dmid, dout, rngs=rngs)
    self.rngs = rngs

  def __call__(self, x):
    x = jax.nn.relu(self.linear1(x))
    mean = self.linear_mean(x)
    std = jnp.exp(self.linear_std(x))
    divergence = -jnp.log(std**2) - 1.0 + std**2 + mean**2
    self.kl_loss = Loss(jnp.mean(0.5 * jnp.mean(divergence, axis=-1)))
    return mean + std * jax.random.normal(self.rngs.noise(), mean.shape)


class VAE(nnx.Module):
  """The variational autoencoder of Flax's examples."""

  def __init__(self, din=784, dmid=32, dout=8, *, rngs):
    self.output_shape = (28, 28)
    self.encoder = Encoder(din, dmid, dout, rngs=rngs)
    self.decoder = nnx.Sequential(
      nnx.Linear(dout, dmid, rngs=rngs), nnx.relu, nnx.Linear(dmid, din, rngs=rngs)
    )

  def __call__(self, x):
    logits = self.decoder(self.encoder(x.reshape(x.shape[0], -1)))
    return jnp.reshape(logits, (-1, *self.output_shape))


class MlpBlock(nnx.Module):
  def __init__(self, *, rngs):
    self.linear1 = nnx.Linear(WIDTH, HIDDEN, rngs=rngs)
    self.linear2 = nnx.Linear(HIDDEN, WIDTH, rngs=rngs)
    self.dropout = nnx.Dropout(rate=0.1)

  def __call__(self, inputs, *, rngs=None):
    x = self.dropout(nnx.relu(self.linear1(inputs)), rngs=rngs)
    return self.dropout(self.linear2(x), rngs=rngs)


class EncoderDecoder1DBlock(nnx.Module):
  def __init__(self, *, rngs):
    self.ln1 = nnx.LayerNorm(WIDTH, rngs=rngs)
    self.attention = nnx.MultiHeadAttention(
      num_heads=2, in_features=WIDTH, qkv_features=WIDTH, use_bias=False,
      dropout_rate=0.1, broadcast_dropout=False, decode=False, rngs=rngs,
    )  # fmt: skip
    self.ln2 = nnx.LayerNorm(WIDTH, rngs=rngs)
    self.mlp = MlpBlock(rngs=rngs)
    self.dropout = nnx.Dropout(rate=0.1)

  def __call__(self, inputs, decoder_mask, *, rngs=None):
    x = self.attention(self.ln1(inputs), mask=decoder_mask, rngs=rngs)
    x = self.dropout(x, rngs=rngs) + inputs
    return x + self.mlp(self.ln2(x), rngs=rngs)


class TransformerLM(nnx.Module):
  """The language model of Flax's lm1b example, with blocks in attributes by number."""

  def __init__(self, *, rngs):
    self.output_embed = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
    for index in range(2):
      setattr(self, f'encoderdecoderblock_{index}', EncoderDecoder1DBlock(rngs=rngs))
    self.encoderdecoder_norm = nnx.LayerNorm(WIDTH, rngs=rngs)
    self.logitdense = nnx.Linear(WIDTH, VOCABULARY, rngs=rngs)

  def __call__(self, inputs, *, rngs=None):
    mask = nnx.make_causal_mask(inputs)
    y = self.output_embed(inputs.astype('int32'))
    for index in range(2):
      y = getattr(self, f'encoderdecoderblock_{index}')(y, mask, rngs=rngs)
    return self.logitdense(self.encoderdecoder_norm(y))


# How each is made and called, the shape of its outputs, and the multiply-accumulates of
# its layers by hand.
TOKENS = np.zeros((1, LENGTH), np.int32)
_BLOCK = {
  **{
    f'attention/{name}': LENGTH * WIDTH**2 for name in ('query', 'key', 'value', 'out')
  },
  **{f'mlp/linear{number}': LENGTH * WIDTH * HIDDEN for number in (1, 2)},
}
NETWORKS = {
  'decoder': (
    Decoder,
    TOKENS,
    (1, LENGTH, VOCABULARY),
    {
      'layers/0/attn/q_einsum': LENGTH * WIDTH * HEADS * HEAD_SIZE,
      'layers/0/attn/kv_einsum': LENGTH * WIDTH * 2 * KEYS * HEAD_SIZE,
      'layers/0/attn/attn_vec_einsum': LENGTH * HEADS * HEAD_SIZE * WIDTH,
      **{
        f'layers/0/mlp/{name}_proj': LENGTH * WIDTH * HIDDEN
        for name in ('gate', 'up', 'down')
      },
      'embedder/embedding': LENGTH * WIDTH * VOCABULARY,
    },
  ),
  'mnist': (
    CNN,
    np.zeros((1, 28, 28, 1), np.float32),
    (1, 10),
    {
      'conv1': 28**2 * 9 * 32,
      'conv2': 14**2 * 9 * 32 * 64,
      'linear1': 3136 * 256,
      'linear2': 256 * 10,
    },
  ),
  'vae': (
    lambda rngs: VAE(rngs=rngs),
    np.zeros((1, 28, 28), np.float32),
    (1, 28, 28),
    {
      'encoder/linear1': 784 * 32,
      'encoder/linear_mean': 32 * 8,
      'encoder/linear_std': 32 * 8,
      'decoder/layers/0': 8 * 32,
      'decoder/layers/2': 32 * 784,
    },
  ),
  'lm1b': (
    TransformerLM,
    TOKENS,
    (1, LENGTH, VOCABULARY),
    {
      **{
        f'encoderdecoderblock_{index}/{path}': macs
        for index in (0, 1)
        for path, macs in _BLOCK.items()
      },
      'logitdense': LENGTH * WIDTH * VOCABULARY,
    },
  ),
}


@pytest.mark.parametrize('name', NETWORKS)
def test_its_layers_are_found_and_counted(name):
  make, inputs, shape, macs = NETWORKS[name]
  model = make(rngs=nnx.Rngs(0))
  searchable = fliqs_jax.make_searchable(model)
  coverage = searchable.coverage(inputs)
  assert {layer.path: layer.macs for layer in coverage.layers} == macs
  looked_up = {'output_embed'} if name == 'lm1b' else set()
  assert set(coverage.skipped) == looked_up
  # A call in training, with dropout and noise, traces and keeps the shapes.
  variables = searchable.init(None, inputs)

  def train(variables, key):
    return searchable.apply(
      variables, inputs, mutable=list(variables), rngs={'dropout': key}
    )

  outputs, updated = jax.eval_shape(train, variables, jax.random.key(0))
  assert outputs.shape == shape
  del updated['params']
  shapes = lambda tree: jax.tree.map(jnp.shape, tree)
  assert shapes(updated) == shapes({name: variables[name] for name in updated})


def test_the_decoder_is_searched():
  tokens = np.random.default_rng(0).integers(VOCABULARY, size=(4, LENGTH + 1))
  result = fliqs_jax.search(
    Decoder(rngs=nnx.Rngs(0)), [{'tokens': tokens}], [{'tokens': tokens}],
    inputs=lambda batch: batch['tokens'][:, :-1],
    loss=lambda logits, batch: optax.softmax_cross_entropy_with_integer_labels(
      logits, batch['tokens'][:, 1:]
    ),
    num_steps=4, num_samples=2, formats='int4,int8', target_format='int4',
    target_scale=2.0,
  )  # fmt: skip
  macs = NETWORKS['decoder'][3]
  bits = {'int4': 16, 'int8': 64}
  cost = sum(macs[path] * bits[f['weights']] for path, f in result.formats.items())
  assert set(result.formats) == set(macs)
  assert result.cost == pytest.approx(cost / 1e9) and result.cost <= result.target
  logits = nnx.jit(lambda model, tokens: model(tokens))(result.model, tokens[:, :-1])
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
  assert result.eval['loss'] == pytest.approx(float(losses.mean()), rel=1e-5)
