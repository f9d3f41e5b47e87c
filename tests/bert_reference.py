"""A forward pass of BERT in NumPy, in float64, of tensors by Hugging Face's names.

Written after Devlin et al. (2018), arXiv 1810.04805, and the equations of Vaswani et
al. (2017), arXiv 1706.03762, one text at a time, so that it needs no mask.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from scipy import special

Tensors = Mapping[str, np.ndarray]


def embedding(tensors: Tensors, num_heads: int, tokens: Sequence[int]) -> np.ndarray:
  """Returns the embedding of a text, the mean over its tokens scaled to length 1.

  Args:
    tensors: of the checkpoint.
    num_heads: of the attention.
    tokens: of one text, without what fills it up.
  """
  mean = outputs(tensors, num_heads, tokens).mean(0)
  return mean / np.sqrt(np.sum(mean**2))


def outputs(tensors: Tensors, num_heads: int, tokens: Sequence[int]) -> np.ndarray:
  """Returns the outputs float64[T, hidden] of the last block for T tokens."""
  weight = lambda name: np.asarray(tensors[f'{name}.weight'], np.float64)
  affine = lambda x, name: x @ weight(name).T + tensors[f'{name}.bias']

  def norm(x, name):
    x = x - x.mean(1, keepdims=True)
    x = x / np.sqrt((x**2).mean(1, keepdims=True) + 1e-12)
    return x * weight(name) + tensors[f'{name}.bias']

  x = weight('embeddings.word_embeddings')[np.array(tokens)]
  x = x + weight('embeddings.position_embeddings')[: len(tokens)]
  x = x + weight('embeddings.token_type_embeddings')[0]
  x = norm(x, 'embeddings.LayerNorm')
  for layer in _layers(tensors):
    q, k, v = (
      np.split(affine(x, f'{layer}.attention.self.{name}'), num_heads, axis=1)
      for name in ('query', 'key', 'value')
    )
    heads = [_attend(*head) for head in zip(q, k, v)]
    y = affine(np.concatenate(heads, 1), f'{layer}.attention.output.dense')
    x = norm(x + y, f'{layer}.attention.output.LayerNorm')
    y = affine(x, f'{layer}.intermediate.dense')
    y = y * (1 + special.erf(y / np.sqrt(2))) / 2
    x = norm(x + affine(y, f'{layer}.output.dense'), f'{layer}.output.LayerNorm')
  return x


def _attend(q, k, v):
  return special.softmax(q @ k.T / np.sqrt(q.shape[1]), axis=1) @ v


def _layers(tensors: Tensors) -> Iterator[str]:
  index = 0
  while f'encoder.layer.{index}.output.dense.weight' in tensors:
    yield f'encoder.layer.{index}'
    index += 1


def draw(
  rng: np.random.Generator, hidden: int, mlp: int, depth: int, values: int, length: int
) -> dict[str, np.ndarray]:
  """Returns random tensors float32 of a network; norms and biases are random too."""
  shapes = {
    'embeddings.word_embeddings.weight': (values, hidden),
    'embeddings.position_embeddings.weight': (length, hidden),
    'embeddings.token_type_embeddings.weight': (2, hidden),
    'embeddings.LayerNorm.weight': (hidden,),
    'embeddings.LayerNorm.bias': (hidden,),
    'pooler.dense.weight': (hidden, hidden),
    'pooler.dense.bias': (hidden,),
  }
  for index in range(depth):
    for name, inputs, outs in (
      ('attention.self.query', hidden, hidden),
      ('attention.self.key', hidden, hidden),
      ('attention.self.value', hidden, hidden),
      ('attention.output.dense', hidden, hidden),
      ('attention.output.LayerNorm', None, hidden),
      ('intermediate.dense', hidden, mlp),
      ('output.dense', mlp, hidden),
      ('output.LayerNorm', None, hidden),
    ):
      shape = (outs,) if inputs is None else (outs, inputs)
      shapes[f'encoder.layer.{index}.{name}.weight'] = shape
      shapes[f'encoder.layer.{index}.{name}.bias'] = (outs,)
  return {name: rng.normal(size=shape).astype('f') for name, shape in shapes.items()}
