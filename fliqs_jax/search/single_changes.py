"""Single changes: one decision in each of its formats, the others unquantized.

What an option costs in quality is measured against the unquantized network. A space has
no choices for that, so it is opened: each decision gets float32 as one option more, and
the operands that are fixed to a format become decisions between that and float32.
"""

import dataclasses
from typing import NamedTuple

import numpy as np

from fliqs_jax.search.space import OPERANDS, UNQUANTIZED, Decision, SearchSpace


class OpenSpace(NamedTuple):
  """A space of formats with the choices that leave its operands unquantized.

  P formats to which operands are fixed follow the N decisions.
  """

  space: SearchSpace
  unquantized: np.ndarray  # int32[N + P], the network in float32
  reference: np.ndarray  # int32[N + P], the same, but for operands that are fixed

  def choices(self, choices: np.ndarray) -> np.ndarray:
    """Returns choices int32[N] of the space that was opened, int32[N + P]."""
    num_fixed = len(self.reference) - len(choices)
    return np.concatenate([choices, np.zeros(num_fixed, np.int32)]).astype(np.int32)

  def changed(self, decision: int, option: int) -> np.ndarray:
    """Returns the reference with one decision in one of its formats, int32[N + P]."""
    choices = self.reference.copy()
    choices[decision] = option
    return choices


def open_space(space: SearchSpace) -> OpenSpace:
  """Returns a space, opened. Its options keep their places.

  Args:
    space: of formats, whose architecture is fixed.
  """
  decisions = [
    Decision(name, options if UNQUANTIZED in options else (*options, UNQUANTIZED))
    for name, options in space.format_decisions
  ]
  fixed = dict.fromkeys(
    a for a in space.weights + space.activations if isinstance(a, str)
  )
  fixed = [name for name in fixed if name != UNQUANTIZED]
  places = {name: len(decisions) + i for i, name in enumerate(fixed)}
  decisions += [Decision(f'fixed to {name}', (name, UNQUANTIZED)) for name in fixed]
  unquantized = np.array([d.options.index(UNQUANTIZED) for d in decisions], np.int32)
  reference = unquantized.copy()
  reference[len(space.format_decisions) :] = 0
  opened = {
    operand: tuple(places.get(a, a) for a in getattr(space, operand))
    for operand in OPERANDS
  }
  space = dataclasses.replace(space, format_decisions=tuple(decisions), **opened)
  return OpenSpace(space, unquantized, reference)


def single_changes(space: SearchSpace) -> list[tuple[int, int]]:
  """Returns the pairs (decision, option) of all formats that quantize."""
  return [
    (i, k)
    for i, decision in enumerate(space.format_decisions)
    for k, name in enumerate(decision.options)
    if name != UNQUANTIZED
  ]
