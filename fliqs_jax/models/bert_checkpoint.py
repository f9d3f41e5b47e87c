"""Weights of BERT by their names on Hugging Face, given to our encoder.

    from safetensors.numpy import load_file

    config = json.loads(pathlib.Path('config.json').read_text())
    encoder = Encoder(**bert_checkpoint.sizes(config), rngs=nnx.Rngs(0))
    bert_checkpoint.load(encoder, load_file('model.safetensors'))

A dense layer's weights are stored as `[outputs, inputs]` there.
"""

from collections.abc import Mapping
from typing import Any

from flax import nnx, traverse_util
import jax.numpy as jnp
import numpy as np

from fliqs_jax.errors import ConfigError
from fliqs_jax.models.common import config_problems
from fliqs_jax.models.encoder import Encoder, MaskedLanguageModel

_SIZES = {
  'vocab_size': 'vocabulary_size',
  'hidden_size': 'hidden_size',
  'num_hidden_layers': 'depth',
  'num_attention_heads': 'num_heads',
  'intermediate_size': 'mlp_size',
  'max_position_embeddings': 'max_tokens',
  'type_vocab_size': 'num_types',
}
# What the encoder computes, whatever its sizes.
_FIXED = {
  'model_type': 'bert',
  'hidden_act': 'gelu',
  'position_embedding_type': 'absolute',
  'layer_norm_eps': 1e-12,
}
# Modules outside of the blocks, and within each of them.
_MODULES = {
  'tokens': 'embeddings.word_embeddings',
  'positions': 'embeddings.position_embeddings',
  'types': 'embeddings.token_type_embeddings',
  'norm': 'embeddings.LayerNorm',
}
_BLOCK_MODULES = {
  'query': 'attention.self.query',
  'key': 'attention.self.key',
  'value': 'attention.self.value',
  'out': 'attention.output.dense',
  'norm_attention': 'attention.output.LayerNorm',
  'up': 'intermediate.dense',
  'down': 'output.dense',
  'norm_mlp': 'output.LayerNorm',
}
# Modules of the network that predicts hidden tokens, around its encoder.
_HEAD_MODULES = {
  'transform': 'cls.predictions.transform.dense',
  'norm': 'cls.predictions.transform.LayerNorm',
}
_HEAD_BIAS = 'cls.predictions.bias'
_BIAS = 'bias'  # all other leaves are a `weight` there
_PREFIX = 'bert.'  # of the encoder's leaves in a network with a head
_UNUSED = ('pooler.', 'embeddings.position_ids')


def sizes(config: Mapping[str, Any]) -> dict[str, int]:
  """Returns the sizes of the encoder that a `config.json` describes.

  Args:
    config: its content.

  Raises:
    ConfigError: where a size is missing, or the network computes something else; with
      a line for each.
  """
  problems = config_problems(config, _FIXED, _SIZES)
  if problems:
    raise ConfigError(*(f'config of a BERT: {p}' for p in problems))
  return {ours: config[theirs] for theirs, ours in _SIZES.items()}


def params(
  config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]
) -> dict[str, Any]:
  """Returns the parameters of a `MaskedLanguageModel`, nested dicts of arrays.

  Args:
    config: the content of `config.json`.
    tensors: by their names on Hugging Face, as `safetensors.numpy.load_file` returns
      them. Those of other heads are left out.

  Raises:
    ConfigError: as `sizes`.
  """
  shapes = nnx.eval_shape(
    lambda: MaskedLanguageModel(**sizes(config), rngs=nnx.Rngs(0))
  )
  found, given = {}, {**_of_encoder(tensors), **_of_head(tensors)}
  for path, _ in nnx.to_flat_state(nnx.state(shapes, nnx.Param)):
    name = _name(path[1:]) if path[0] == 'encoder' else _head_name(path)
    if name in given:
      found[tuple(map(str, path))] = _ours(path, given[name])
  return traverse_util.unflatten_dict(found)


def load(encoder: Encoder, tensors: Mapping[str, np.ndarray]) -> None:
  """Gives an encoder the weights of a checkpoint.

  Args:
    encoder: of the checkpoint's sizes; it is changed.
    tensors: by their names on Hugging Face, as `safetensors.numpy.load_file` returns
      them. Pooling and heads, which the encoder lacks, are left out.

  Raises:
    ConfigError: where leaves are missing, unknown or of other shapes, in one line that
      names them; the encoder stays as it was.
  """
  given = _of_encoder(tensors)
  state = nnx.to_flat_state(nnx.state(encoder, nnx.Param))
  names = {path: _name(path) for path, _ in state}
  shapes = {names[path]: _shape(path, leaf) for path, leaf in state}
  problems = [
    *(f'{name} is missing' for name in shapes if name not in given),
    *(f'{name} is unknown' for name in given if name not in shapes),
    *(
      f'{name} has shape {np.shape(given[name])} where {shape} is expected'
      for name, shape in shapes.items()
      if name in given and np.shape(given[name]) != shape
    ),
  ]
  if problems:
    raise ConfigError(f'not the checkpoint of this encoder: {"; ".join(problems)}')
  loaded = [
    (path, leaf.replace(jnp.asarray(_ours(path, given[names[path]]), leaf.dtype)))
    for path, leaf in state
  ]
  nnx.update(encoder, nnx.from_flat_state(loaded))


def _of_encoder(tensors):
  """Returns the encoder's tensors, without the prefix that some checkpoints have."""
  if any(name.startswith(_PREFIX) for name in tensors):
    tensors = {
      name.removeprefix(_PREFIX): tensor
      for name, tensor in tensors.items()
      if name.startswith(_PREFIX)
    }
  return {n: tensor for n, tensor in tensors.items() if not n.startswith(_UNUSED)}


def _of_head(tensors):
  names = (*_HEAD_MODULES.values(), _HEAD_BIAS)
  return {n: tensor for n, tensor in tensors.items() if n.startswith(names)}


def _head_name(path):
  if len(path) == 1:
    return _HEAD_BIAS
  module, leaf = path
  return f'{_HEAD_MODULES[module]}.{_BIAS if leaf == _BIAS else "weight"}'


def _name(path):
  """Returns the name on Hugging Face of the leaf at a path of the encoder."""
  *module, leaf = path
  leaf = _BIAS if leaf == _BIAS else 'weight'
  if len(module) == 1:
    return f'{_MODULES[module[0]]}.{leaf}'
  _, index, name = module
  return f'encoder.layer.{index}.{_BLOCK_MODULES[name]}.{leaf}'


def _ours(path, tensor):
  return tensor.T if path[-1] == 'kernel' else tensor


def _shape(path, leaf):
  return leaf.shape[::-1] if path[-1] == 'kernel' else leaf.shape
