"""Llama and Gemma in NumPy, by the published equations, on names of Hugging Face.

Touvron et al., 2023 (arXiv 2302.13971), Section 2.2, and Gemma (arXiv 2403.08295),
Section 2. One text at a time, in float64, with a loop over heads.
"""

import numpy as np


def draw(rng, config):
  """Returns random weights `{name: float32[...]}` of a `config.json`."""
  hidden, mlp = config['hidden_size'], config['intermediate_size']
  heads, groups = config['num_attention_heads'], config['num_key_value_heads']
  size = config['head_dim']
  shapes = {'model.embed_tokens': (config['vocab_size'], hidden), 'model.norm': hidden}
  for layer in range(config['num_hidden_layers']):
    shapes |= {
      f'model.layers.{layer}.{name}': shape
      for name, shape in {
        'self_attn.q_proj': (heads * size, hidden),
        'self_attn.k_proj': (groups * size, hidden),
        'self_attn.v_proj': (groups * size, hidden),
        'self_attn.o_proj': (hidden, heads * size),
        'mlp.gate_proj': (mlp, hidden),
        'mlp.up_proj': (mlp, hidden),
        'mlp.down_proj': (hidden, mlp),
        'input_layernorm': hidden,
        'post_attention_layernorm': hidden,
      }.items()
    }
  if not config['tie_word_embeddings']:
    shapes['lm_head'] = (config['vocab_size'], hidden)
  return {
    f'{name}.weight': rng.normal(scale=0.3, size=shape).astype(np.float32)
    for name, shape in shapes.items()
  }


def logits(weights, config, tokens):
  """Returns the logits float64[T, vocab_size] of one text's tokens."""
  is_gemma = config['model_type'] == 'gemma'
  w = lambda name: weights[f'{name}.weight'].astype(np.float64)

  def norm(x, name):
    scale = w(name) + 1 if is_gemma else w(name)
    mean = np.mean(x * x, axis=-1, keepdims=True)
    return x / np.sqrt(mean + config['rms_norm_eps']) * scale

  x = w('model.embed_tokens')[tokens]
  if is_gemma:
    x = x * np.sqrt(config['hidden_size'])
  for layer in range(config['num_hidden_layers']):
    name = f'model.layers.{layer}'
    x = x + _attention(
      norm(x, f'{name}.input_layernorm'), w, f'{name}.self_attn', config
    )
    y = norm(x, f'{name}.post_attention_layernorm')
    gate = y @ w(f'{name}.mlp.gate_proj').T
    if is_gemma:
      inner = np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)
      gate = 0.5 * gate * (1 + np.tanh(inner))
    else:
      gate = gate / (1 + np.exp(-gate))
    y = gate * (y @ w(f'{name}.mlp.up_proj').T)
    x = x + y @ w(f'{name}.mlp.down_proj').T
  x = norm(x, 'model.norm')
  tied = config['tie_word_embeddings']
  return x @ w('model.embed_tokens' if tied else 'lm_head').T


def _attention(x, w, name, config):
  size, count = config['head_dim'], len(x)
  shared = config['num_attention_heads'] // config['num_key_value_heads']
  query, key, value = (
    (x @ w(f'{name}.{kind}_proj').T).reshape(count, -1, size) for kind in 'qkv'
  )
  angles = np.arange(count)[:, None] / config['rope_theta'] ** (
    np.arange(0, size, 2) / size
  )
  angles = np.concatenate([angles, angles], axis=-1)

  def rotate(head):
    half = size // 2
    turned = np.concatenate([-head[:, half:], head[:, :half]], axis=-1)
    return head * np.cos(angles) + turned * np.sin(angles)

  heads = []
  for head in range(config['num_attention_heads']):
    scores = rotate(query[:, head]) @ rotate(key[:, head // shared]).T / np.sqrt(size)
    scores[np.triu_indices(count, 1)] = -np.inf
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    heads.append(weights @ value[:, head // shared])
  return np.concatenate(heads, axis=-1) @ w(f'{name}.o_proj').T
