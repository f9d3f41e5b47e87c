"""Rows of a report: layers, decisions, milestones, scalars and fields of the config."""

from collections.abc import Mapping
import math
import shlex
from typing import Any

from fliqs_jax.reporting.recorded_run import Run, decisions_by_layer
from fliqs_jax.reporting.training_figures import Milestone
from fliqs_jax.runs import quality
from fliqs_jax.runs.workdir import EVALUATED
from fliqs_jax.search.options import is_option, join, split
from fliqs_jax.search.quantities import counted_bits

# Scalars of a history that a report draws: title, how a number reads, reference line.
_PANELS = {
  'loss': ('Training loss', '{:.3g}', None),
  'accuracy': ('Training accuracy', '{:.1%}', None),
  'bits_per_byte': ('Training bits per byte', '{:.4g}', None),
  'quality': ('Training quality', '{:.4g}', None),
  'reward': ('Reward', '{:.3f}', None),
  'cost_ratio': ('Cost ÷ target', '{:.3f}', 1.0),
  'entropy': ('Entropy (nats)', '{:.3g}', None),
  'learning_rate': ('Learning rate', '{:.2g}', None),
}


def layers(result: Mapping[str, Any], reference: str | None) -> list[dict[str, Any]]:
  """Returns a row for each layer in network order; what is not known is None."""
  described = result.get('layers', {})
  total = sum(layer['cost'] for layer in described.values())
  adds_up = math.isclose(total, result['cost'], rel_tol=1e-6)  # not so for a peak
  rows = []
  for path, operands in result['formats'].items():
    layer = described.get(path, {})
    cost = layer.get('cost')
    rows.append(
      {
        'path': path,
        **operands,
        'kind': layer.get('kind'),
        'macs': layer.get('macs'),
        'params': layer.get('params'),
        'cost': cost,
        'share': cost / total if cost is not None and total and adds_up else None,
        'reference_cost': layer.get('uniform_costs', {}).get(reference),
      }
    )
  return rows


def architecture(run: Run) -> dict[str, Any]:
  """Returns what was chosen of the network itself, by decision; empty without."""
  return (run.result or {}).get('architecture', {})


def decisions(run: Run) -> list[dict[str, Any]]:
  """Returns `name`, `options`, `probabilities` and `found` of each decision.

  Options from few bits to many, or from small to large. Found is what the result has,
  or the likeliest option where the run is not finished.
  """
  if not run.history:
    return []
  found = chosen(run.result) if run.result else {}
  rows = []
  for name, options in run.history[-1]['policy'].items():
    ordered = sorted(options, key=option_order)
    last = options[max(options, key=options.get)] if options else None
    likeliest = max(options, key=options.get, default=None)
    if not ordered:
      continue
    rows.append(
      {
        'name': name,
        'options': ordered,
        'probabilities': [
          [row['policy'].get(name, {}).get(option, 0.0) for option in ordered]
          for row in run.history
        ],
        'found': found.get(name, likeliest),
        'likeliest': likeliest,
        'probability': last,
      }
    )
  return rows


def option_order(option: str) -> tuple:
  """Returns what options are sorted by: formats by bits, then sizes, then others."""
  if is_option(option):
    return (0, sum(map(counted_bits, split(option))), option)
  try:
    return (1, float(option), option)
  except ValueError:
    return (2, 0, option)


def chosen(result: Mapping[str, Any]) -> dict[str, str]:
  """Returns the option that the result has of each decision that governs something."""
  found = {name: str(size) for name, size in result.get('architecture', {}).items()}
  for path, operands in decisions_by_layer(result).items():
    formats = result['formats'][path]
    for operand, decision in operands.items():
      if decision is not None:
        both = set(operands.values()) == {decision}
        found.setdefault(decision, join(**formats) if both else formats[operand])
  return found


def milestones(run: Run) -> list[Milestone]:
  """Returns the steps at which a run changed."""
  search, mode = run.config['search'], run.config['mode']
  found = [('a', search['activation_delay'], 'activations are quantized from here on')]
  if mode == 'search':
    found.append(('p', search['policy_delay'], 'the policy starts to learn'))
    if search['hard_budget']:
      found.append(
        ('c', search['commit_step'], 'the formats are committed within the target')
      )
  return [Milestone(step, letter, meaning) for letter, step, meaning in found]


def panels(run: Run) -> dict[str, dict[str, Any]]:
  """Returns the scalars that every line of a history has, for `curves`."""
  qualities = {'accuracy', 'bits_per_byte', 'quality'}
  judged = {quality.find_name(row) for row in run.history}
  if len(judged) > 1:  # an accuracy that is a fraction in some lines alone is none
    judged -= {'accuracy'}
  hidden = qualities - judged
  return {
    title: {
      'values': [row[name] for row in run.history],
      'format': form,
      'reference': reference,
      'evaluated': [
        (row['step'], row[EVALUATED + name])
        for row in run.history
        if EVALUATED + name in row
      ],
    }
    for name, (title, form, reference) in _PANELS.items()
    if name not in hidden and all(name in row for row in run.history)
  }


def settings(config: Mapping[str, Any], prefix: str = '') -> list[tuple[str, Any]]:
  """Returns the fields of a config, nested ones by dotted names."""
  rows = []
  for name, value in config.items():
    if isinstance(value, dict):
      rows += settings(value, f'{prefix}{name}.')
    else:
      rows.append((prefix + name, value))
  return rows


def command(run: Run) -> str | None:
  """Returns the command that does the run again, to be given in the run's folder.

  None where no command can, since the network and its data are a Python program's.
  """
  if run.made_in_python:
    return None
  name = run.workdir.absolute().name
  workdir = shlex.quote(f'--workdir=../{name}_again')
  return f'python -m fliqs_jax.main --config=. {workdir}'
