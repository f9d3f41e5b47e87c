"""Weights of Llama and Gemma by their names on Hugging Face, as those of our decoder.

    from safetensors.numpy import load_file

    config = json.loads(pathlib.Path('config.json').read_text())
    decoder = Decoder(**llama_checkpoint.sizes(config), rngs=nnx.Rngs(0))
    llama_checkpoint.load(decoder, config, load_file('model.safetensors'))

A dense layer's weights are stored as `[outputs, inputs]` there, and the scale of
Gemma's normalisation as its difference from 1.
"""

from collections.abc import Mapping
import re
from typing import Any

from flax import nnx, traverse_util
import jax.numpy as jnp
import numpy as np

from fliqs_jax.errors import ConfigError
from fliqs_jax.models.common import config_problems
from fliqs_jax.models.decoder import Decoder

KINDS = ('llama', 'gemma')  # values of `model_type`
_SIZES = {
  'vocab_size': 'vocabulary_size',
  'hidden_size': 'hidden_size',
  'num_hidden_layers': 'depth',
  'num_attention_heads': 'num_heads',
  'intermediate_size': 'mlp_size',
}
_ACTIVATIONS = {'silu': 'silu', 'gelu': 'gelu', 'gelu_pytorch_tanh': 'gelu'}
# What the decoder lacks.
_FIXED = {'rope_scaling': None, 'attention_bias': False, 'mlp_bias': False}
_LEAVES = {
  'model.embed_tokens.weight': ('embedding', 'embedding'),
  'model.norm.weight': ('norm', 'scale'),
  'lm_head.weight': ('head', 'kernel'),
}
_BLOCK_LEAVES = {
  'self_attn.q_proj': ('attention', 'query', 'kernel'),
  'self_attn.k_proj': ('attention', 'key', 'kernel'),
  'self_attn.v_proj': ('attention', 'value', 'kernel'),
  'self_attn.o_proj': ('attention', 'out', 'kernel'),
  'mlp.gate_proj': ('mlp', 'gate', 'kernel'),
  'mlp.up_proj': ('mlp', 'up', 'kernel'),
  'mlp.down_proj': ('mlp', 'down', 'kernel'),
  'input_layernorm': ('norm_attention', 'scale'),
  'post_attention_layernorm': ('norm_mlp', 'scale'),
}
_BLOCK = re.compile(r'model\.layers\.(\d+)\.(.+)\.weight')
_UNUSED = '.rotary_emb.inv_freq'  # of old checkpoints, which follows from the sizes


def sizes(config: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the arguments of the decoder that a `config.json` describes.

  Args:
    config: its content.

  Raises:
    ConfigError: where a size is missing, or the network computes something else; with
      a line for each.
  """
  kind, activation = config.get('model_type'), _activation(config)
  problems = []
  if kind not in KINDS:
    hint = ' (bert_checkpoint, in Python, is for that)' if kind == 'bert' else ''
    problems.append(f'model_type is {kind!r}, expected one of {", ".join(KINDS)}{hint}')
  if activation not in _ACTIVATIONS:
    problems.append(f'its activation is {activation!r}, expected a gated silu or gelu')
  problems += config_problems(config, _FIXED, _SIZES)
  if problems:
    raise ConfigError(*(f'config of a Llama or Gemma: {p}' for p in problems))
  heads = config['num_attention_heads']
  return {
    **{ours: config[theirs] for theirs, ours in _SIZES.items()},
    'num_kv_heads': config.get('num_key_value_heads') or heads,
    'head_size': config.get('head_dim') or config['hidden_size'] // heads,
    'activation': _ACTIVATIONS[activation],
    'rotary_base': float(config.get('rope_theta', 10_000.0)),
    'tied': bool(config.get('tie_word_embeddings', kind == 'gemma')),
    'scales_embedding': kind == 'gemma',
    'norm_epsilon': float(config.get('rms_norm_eps', 1e-6)),
  }


def _activation(config):
  # Gemma's first configs say gelu, and mean the approximation by tanh.
  return config.get('hidden_activation') or config.get('hidden_act', 'silu')


def params(
  config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]
) -> dict[str, Any]:
  """Returns the parameters of the decoder, nested dicts of arrays.

  Args:
    config: the content of `config.json`.
    tensors: by their names on Hugging Face, as `safetensors.numpy.load_file` returns
      them.

  Raises:
    ConfigError: as `sizes`, or where names are unknown, in one line.
  """
  tied, is_gemma = sizes(config)['tied'], config['model_type'] == 'gemma'
  found, unknown = {}, []
  for name, tensor in tensors.items():
    if name.endswith(_UNUSED) or (tied and name == 'lm_head.weight'):
      continue
    path = _path(name)
    if path is None:
      unknown.append(name)
    elif path[-1] == 'kernel':
      found[path] = tensor.T
    elif path[-1] == 'scale' and is_gemma:
      found[path] = tensor.astype(np.float32) + 1
    else:
      found[path] = tensor
  if unknown:
    raise ConfigError(
      f'not the checkpoint of a {config["model_type"]}: {", ".join(unknown)} unknown'
    )
  return traverse_util.unflatten_dict(found)


def load(
  decoder: Decoder, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]
) -> None:
  """Gives a decoder the weights of a checkpoint.

  Args:
    decoder: of the checkpoint's sizes; it is changed.
    config: the content of `config.json`.
    tensors: as in `params`.

  Raises:
    ConfigError: as `params`, or where leaves are missing, unknown or of other shapes,
      in one line that names them; the decoder stays as it was.
  """
  given = traverse_util.flatten_dict(params(config, tensors), sep='/')
  state = nnx.to_flat_state(nnx.state(decoder, nnx.Param))
  own = {'/'.join(map(str, path)): (path, leaf) for path, leaf in state}
  problems = [
    *(f'{name} is missing' for name in own if name not in given),
    *(f'{name} is unknown' for name in given if name not in own),
    *(
      f'{name} has shape {given[name].shape} where {leaf.shape} is expected'
      for name, (_, leaf) in own.items()
      if name in given and given[name].shape != leaf.shape
    ),
  ]
  if problems:
    raise ConfigError(f'not the checkpoint of this decoder: {"; ".join(problems)}')
  loaded = [
    (path, leaf.replace(jnp.asarray(given[name], leaf.dtype)))
    for name, (path, leaf) in own.items()
  ]
  nnx.update(decoder, nnx.from_flat_state(loaded))


def _path(name):
  """Returns the path in the decoder of a leaf's name; None for an unknown one."""
  if match := _BLOCK.fullmatch(name):
    index, leaf = match.groups()
    return leaf in _BLOCK_LEAVES and ('blocks', index, *_BLOCK_LEAVES[leaf]) or None
  return _LEAVES.get(name)
