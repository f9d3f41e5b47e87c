"""What `validate` finds, field by field."""

import jax
import ml_collections
import pytest

from fliqs_jax.errors import ConfigError
from fliqs_jax.runs import setup as setup_lib
from fliqs_jax.runs.config import default_config, resolve
from fliqs_jax.runs.validation import OWN_BATCHES, validate

REINFORCE = {'search.strategy': 'policy_gradient'}


def problems_of(num_devices=1, **changes):
  config = default_config()
  config.update_from_flattened_dict(changes)
  return validate(resolve(config), num_devices)


def test_default_config_is_valid_and_locked():
  assert problems_of() == []
  with pytest.raises((AttributeError, KeyError)):
    default_config().serach = 1


def test_resolve_fills_steps_in_and_leaves_the_config_alone():
  config = default_config()
  config.num_steps = 1000
  resolved = resolve(config)
  assert resolved.search.strategy == 'actor_critic'
  assert resolved.search.policy_delay == 250  # T / 4
  assert resolved.search.commit_step == 350  # 0.35 · T
  assert resolved.search.weight_delay == resolved.search.activation_delay == 350
  assert config.search.policy_delay is None
  config.search.policy_delay = 980
  assert resolve(config).search.policy_delay == 980
  assert resolve(config).search.commit_step == 990  # half of what is left


def test_delays_and_quality_of_the_paper_come_with_its_strategy():
  config = default_config()
  config.num_steps, config.search.strategy = 1000, 'policy_gradient'
  resolved = resolve(config)
  assert resolved.search.policy_delay == 250  # T / 4
  assert resolved.search.commit_step == 900  # 0.9 · T
  assert resolved.search.activation_delay == 100  # T / 10
  assert resolved.search.weight_delay == 0
  assert resolved.reward.quality == 'accuracy'
  assert resolve(default_config()).reward.quality == 'minus_loss'


def test_architectures_are_searched_by_the_strategy_that_trains_them():
  config = default_config()
  config.search.decide = 'both'
  assert resolve(config).search.strategy == 'policy_gradient'
  (problem,) = problems_of(**{'search.decide': 'both', 'search.strategy': 'random'})
  assert 'expected policy_gradient for search.decide=both' in problem


@pytest.mark.parametrize('num_samples, baseline', [(1, 'moving'), (2, 'leave_one_out')])
def test_baseline_follows_the_samples(num_samples, baseline):
  config = default_config()
  config.search.num_samples = num_samples
  assert resolve(config).controller.baseline == baseline


@pytest.mark.parametrize('num_steps', [1, 2, 3, 10])
def test_short_runs_are_valid(num_steps):
  assert problems_of(num_steps=num_steps) == []


@pytest.mark.parametrize(
  'changes, expected',
  [
    ({'mode': 'serach'}, "mode='serach'"),
    ({'dtype': 'float16'}, "dtype='float16'"),
    ({'num_steps': 0}, 'num_steps=0'),
    ({'batch_size': -4}, 'batch_size=-4'),
    ({'search.num_samples': 0}, 'search.num_samples=0'),
    ({'optimizer.learning_rate': float('nan')}, 'optimizer.learning_rate=nan'),
    ({'optimizer.momentum': 1.0}, 'optimizer.momentum=1.0'),
    ({'batch_size': 66}, 'a multiple of 4'),
    ({'input.packed': True}, 'input.packed=True: expected False without input.context'),
    ({'search.smoothing': 0.5}, 'search.smoothing=0.5: expected num_steps=0'),
    ({'input.image_shape': (8, 8)}, 'input.image_shape=(8, 8)'),
    ({'input.mean': (0.5, 0.5)}, 'input.mean=(0.5, 0.5)'),
    ({'search.cost_model': 'bop'}, "the nearest is 'bops'"),
    ({'search.cap_cost_model': 'bop'}, "the nearest is 'bops'"),
    ({'search.device': 'tpu_v5'}, "the nearest is 'tpu_v5"),
    ({'search.cap': 3.0}, 'search.cap_cost_model'),
    ({'search.cap_cost_model': 'bops', 'search.cap_format': 'e9m9'}, "'e9m9'"),
    (
      {
        'search.cap_cost_model': 'bops',
        'search.hard_budget': False,
        'search.strategy': 'policy_gradient',
      },
      'expected search.hard_budget=True',
    ),
    ({'search.formats': 'int4,int9'}, "the nearest is 'int8'"),
    ({'search.target_format': 'e9m9'}, "unknown format 'e9m9'"),
    ({'search.pins': (('a', 'int1'),)}, "unknown format 'int1'"),
    ({'search.target': 0.0}, 'search.target=0.0'),
    ({'search.policy_delay': 1000}, 'never learns'),
    ({'search.activation_delay': 1000}, 'never quantized'),
    ({'search.commit_step': 99}, 'search.commit_step=99'),
    ({'search.weight_delay': 1000}, 'weights are never quantized'),
    ({'search.strategy': 'critic'}, "the nearest is 'actor_critic'"),
    ({'search.num_samples': 1}, 'compares samples on the same examples'),
    ({'search.hard_budget': False}, 'expected search.strategy=policy_gradient'),
    ({'search.commit_step': 1000}, 'search.commit_step=1000'),
    ({'reward.name': 'abs'}, "reward.name='abs'"),
    (REINFORCE | {'reward.beta': -1.0}, 'expected a number above 0'),
    (
      REINFORCE | {'reward.name': 'soft_exponential'},
      'expected a number below 0',
    ),
    ({'reward.split': 'validation'}, 'input.reward_split'),
    (
      REINFORCE | {'search.num_samples': 1, 'controller.baseline': 'leave_one_out'},
      'the baseline `moving`',
    ),
  ],
)
def test_one_line_for_each_mistake(changes, expected):
  (problem,) = problems_of(**changes)
  assert expected in problem and '\n' not in problem


def test_exponential_rewards_take_no_negative_quality():
  problems = problems_of(
    **REINFORCE
    | {
      'reward.name': 'hard_exponential',
      'reward.beta': -0.07,
      'reward.quality': 'minus_loss',
    }
  )
  assert len(problems) == 1 and 'multiplies the quality' in problems[0]


@pytest.mark.parametrize(
  'num_devices, num_samples, batch_size, valid',
  [(8, 4, 64, True), (8, 4, 60, False), (3, 4, 24, True), (3, 4, 64, False)],
)
def test_batches_split_over_samples_and_devices(
  num_devices, num_samples, batch_size, valid
):
  problems = problems_of(
    num_devices,
    **{
      'search.num_samples': num_samples,
      'batch_size': batch_size,
      'eval_batch_size': 24,
    },
  )
  assert (not problems) == valid


def test_own_batches_are_evaluated_on_any_number_of_devices():
  own = {'dataset': OWN_BATCHES, 'batch_size': 24}
  assert problems_of(3, **own) == []
  assert problems_of(5, **own | {'mode': 'eval'}) == []
  assert len(problems_of(5, **own)) == 1


def test_placeholders_keep_their_type():
  config = default_config()
  with pytest.raises(TypeError):
    config.search.policy_delay = 'soon'
  assert isinstance(config, ml_collections.ConfigDict)


@pytest.mark.parametrize(
  'changes, expected',
  [
    ({'model.name': 'resnet17'}, "the nearest is 'resnet18'"),
    ({'model.width': -1.0}, 'expected a number above 0'),
    ({'model.width': float('inf')}, 'expected a number above 0'),
    ({'model.width': 1e-4}, 'a layer has no channels'),
    ({'model.width': 1e9}, 'longer than 2³¹'),
    ({'search.groups': ('nothing',)}, "'nothing' matches the whole path of no layer"),
    ({'search.groups': ('(',)}, 'not a regular expression'),
    ({'search.groups': ('.*', 'conv_init')}, 'conv_init is matched by both'),
    ({'search.pins': (('.*', 'int8'),)}, 'nothing to search'),
    ({'search.target': 1e9}, 'cannot be reached'),
    ({'search.cap_cost_model': 'model_size', 'search.cap': 10.0}, 'cannot be met'),
    (
      {
        'search.cap_cost_model': 'linear_compute',
        'search.cap_scale': 1.01,
        'search.cost_model': 'roofline',
        'search.formats': 'e2m1,int8',  # of which only the wider is fast there
        'search.target_format': 'int8',
      },
      'cannot be met within the cap',
    ),
  ],
)
def test_problems_that_need_the_network(changes, expected):
  config = default_config()
  config.update_from_flattened_dict(changes)
  with pytest.raises(ConfigError, match='.*') as error:
    setup_lib.build(resolve(config), jax.device_count())
  assert len(error.value.problems) == 1 and expected in str(error.value)
