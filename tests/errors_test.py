"""The user's mistakes, gathered; nothing else is taken for one."""

import pytest

from fliqs_jax.errors import ConfigError, Problems


def find(*mistakes):
  """Raises the mistakes, if there are some."""
  if mistakes:
    raise ConfigError(*mistakes)
  return 'found'


def test_mistakes_are_reported_together_each_once():
  problems = Problems('one')
  assert problems.attempt(find) == 'found'
  assert problems.attempt(find, 'two', 'three\nfour') is None
  assert problems.attempt(find, 'one') is None
  problems.add('two', 'five')
  with pytest.raises(ConfigError) as error:
    problems.raise_any()
  assert error.value.problems == ['one', 'two', 'three', 'four', 'five']


def test_without_mistakes_nothing_is_raised():
  problems = Problems()
  problems.attempt(find)
  problems.raise_any()


@pytest.mark.parametrize('kind', [ValueError, TypeError, KeyError])
def test_other_errors_are_not_taken_for_mistakes(kind):
  def broken():
    raise kind('a bug')

  with pytest.raises(kind, match='a bug'):
    Problems().attempt(broken)
