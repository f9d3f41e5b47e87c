"""Validation: all that can be wrong with the fields of a config, a line for each."""

import math
from typing import Any

import ml_collections

from fliqs_jax.errors import ConfigError, not_among
from fliqs_jax.numerics import calibration
from fliqs_jax.search import cost_models, devices, options
from fliqs_jax.search.controller import BASELINES, ENTROPY_SCHEDULES
from fliqs_jax.search.rewards import REWARDS
from fliqs_jax.search.space import SEARCHED_OPERANDS
from fliqs_jax.search.strategies import STRATEGIES
from fliqs_jax.training import classification, language_modelling

# The dataset of a run from Python, whose network and data no config can name.
OWN_BATCHES = 'own batches'

MODES = ('search', 'train', 'eval')
DTYPES = ('float32', 'bfloat16')
OPTIMIZERS = ('sgd', 'adamw', 'rmsprop')
POST_TRAINING = 'sensitivity'  # the strategy that can do without training

ROUNDINGS = ('nearest', 'reconstruction')  # of weights, by a search without training

# Fields with a number, by the range that it must be in.
_POSITIVE = (
    'batch_size', 'eval_batch_size', 'num_classes', 'checkpoint_every', 'fsdp',
    'log_every', 'model.width', 'input.num_threads', 'optimizer.learning_rate',
    'optimizer.epsilon', 'search.num_samples', 'search.target', 'search.target_scale',
    'search.cap', 'search.cap_scale', 'search.statistics_batches', 'input.context',
    'controller.learning_rate',
)  # fmt: skip
_NOT_NEGATIVE = (
    'seed', 'max_skipped_steps', 'eval_every', 'optimizer.warmup_steps',
    'optimizer.weight_decay', 'optimizer.auxiliary_weight',
    'input.rand_augment_magnitude', 'input.mixup_alpha',
    'input.cutmix_alpha',
    'search.weight_delay', 'search.activation_delay', 'search.policy_delay',
    'search.commit_step', 'search.max_quality_drop', 'search.refinement_rounds',
    'controller.entropy_weight',
)  # fmt: skip
_FRACTIONS = (
    'input.erasing',
    'optimizer.momentum', 'optimizer.square_decay', 'optimizer.label_smoothing',
    'quantizer.momentum', 'controller.baseline_momentum',
)  # fmt: skip


def _names(config):
  """Fields with a name, and the names there are now: cost models may be registered."""
  takes_text = config.input.context is not None
  task = language_modelling if takes_text else classification
  return {
    'mode': MODES,
    'dtype': DTYPES,
    'input.augmentation': ('none', 'crop_flip', 'rand_augment'),
    'optimizer.name': OPTIMIZERS,
    'quantizer.calibration': calibration.LAYER_CALIBRATIONS,
    'quantizer.activation_scale': calibration.ACTIVATION_SCALES,
    'search.rounding': ROUNDINGS,
    'search.weights_and_activations': SEARCHED_OPERANDS,
    'search.strategy': tuple(STRATEGIES),
    'search.decide': ('formats', 'architecture', 'both'),
    'search.cost_model': tuple(cost_models.COST_MODELS),
    'search.cap_cost_model': ('', *cost_models.COST_MODELS),
    'search.device': (None, *devices.DEVICES),
    'reward.name': tuple(REWARDS),
    'reward.quality': tuple(task.QUALITIES),
    'reward.split': ('train', 'validation'),
    'controller.baseline': BASELINES,
    'controller.entropy_schedule': tuple(ENTROPY_SCHEDULES),
  }


def validate(config: ml_collections.ConfigDict, num_devices: int) -> list[str]:
  """Returns all that is wrong with the fields of a resolved config, a line for each.

  What depends on the network or on the dataset is checked where those are known.

  Args:
    config: from `config.resolve`.
    num_devices: of all processes together.
  """
  problems = _check_names(config) + _check_numbers(config)
  problems += _check_batches(config, num_devices) + _check_fsdp(config, num_devices)
  problems += _check_image(config) + _check_text(config)
  problems += _check_augmentation(config) + _check_latency_table(config)
  problems += _check_kv_cache(config)
  problems += _check_steps(config)
  if config.mode == 'search':
    problems += _check_delays(config) + _check_formats(config) + _check_cap(config)
    problems += _check_reward(config) + _check_decide(config) + _check_targets(config)
    problems += _check_quality_drop(config) + _check_rounding(config)
    problems += _check_smoothing(config)
  return problems


def can_build(config: ml_collections.ConfigDict) -> bool:
  """Returns whether the network and its task can be built, whatever else is wrong."""
  names = _names(config)
  known = (_field(config, name) in names[name] for name in ('dtype', 'reward.quality'))
  return all(known) and 0 < config.model.width < math.inf


# Fields with several values, and the type of each.
_ELEMENTS = {
  'input.image_shape': int,
  'input.mean': (int, float),
  'input.stddev': (int, float),
  'search.groups': str,
  'search.pins': tuple,
  'search.targets': (str, int, float),
}


def check_types(
  config: ml_collections.ConfigDict,
  expected: ml_collections.ConfigDict,
  prefix: str = '',
) -> list[str]:
  """Returns the fields whose values are of another type than in `expected`.

  Args:
    config: the config, which may be a copy that knows no types.
    expected: the default config.
    prefix: of the fields' names in messages, for a section.
  """
  problems = []
  for name, default in expected.items():
    field, value, kind = f'{prefix}{name}', config[name], expected.get_type(name)
    if isinstance(default, ml_collections.ConfigDict):
      if field != 'model':  # whose options are the network's own
        problems += check_types(value, default, f'{field}.')
    elif value is None and default is None:
      continue  # follows from others
    elif not isinstance(value, (int, float) if kind is float else kind) or (
      isinstance(value, bool) and kind is not bool
    ):
      problems.append(f'{field}={value!r}: expected a value of type {kind.__name__}')
    elif field in _ELEMENTS and not all(isinstance(v, _ELEMENTS[field]) for v in value):
      problems.append(f'{field}={value!r}: expected values of another type in it')
  if (
    not prefix and not problems and not all(map(_is_pair_of_names, config.search.pins))
  ):
    problems.append(
      f'search.pins={config.search.pins!r}: expected (regex, format) pairs'
    )
  return problems


def _is_pair_of_names(pin):
  return len(pin) == 2 and all(isinstance(name, str) for name in pin)


def _field(config: ml_collections.ConfigDict, name: str) -> Any:
  for part in name.split('.'):
    config = config[part]
  return config


def _check_names(config):
  problems = []
  for field, names in _names(config).items():
    value = _field(config, field)
    if value not in names:
      problems.append(not_among(f'{field}={value!r}', value, filter(None, names)))
  return problems


def _check_numbers(config):
  problems = []
  for fields, expected, valid in (
    (_POSITIVE, 'a number above 0', lambda value: 0 < value < math.inf),
    (_NOT_NEGATIVE, '0 or more', lambda value: 0 <= value < math.inf),
    (_FRACTIONS, 'at least 0 and below 1', lambda value: 0 <= value < 1),
  ):
    for field in fields:
      value = _field(config, field)
      if value is not None and not valid(value):
        problems.append(f'{field}={value}: expected {expected}')
  return problems


def trains_nothing(config: ml_collections.ConfigDict) -> bool:
  """Returns whether a config searches the formats of given weights without a step."""
  return config.mode == 'search' and config.num_steps == 0


def _check_steps(config):
  steps, strategy = config.num_steps, config.search.strategy
  if steps < 0 or (steps == 0 and config.mode == 'train'):
    return [f'num_steps={steps}: expected a number above 0']
  if trains_nothing(config) and strategy != POST_TRAINING and strategy in STRATEGIES:
    return [
      f'num_steps=0: expected a number above 0, or search.strategy={POST_TRAINING}, '
      'which searches the formats of trained weights without a step'
    ]
  warmup = config.optimizer.warmup_steps
  if steps and warmup > steps:
    return [f'optimizer.warmup_steps={warmup}: expected no more than num_steps={steps}']
  if trains_nothing(config) and config.search.targets:
    return [
      f'search.targets={config.search.targets!r}: expected num_steps above 0, since a '
      'search without training has one target'
    ]
  return []


def _check_quality_drop(config):
  search, drop = config.search, config.search.max_quality_drop
  if drop is None:
    return []
  if not trains_nothing(config):
    return [
      f'search.max_quality_drop={drop:g}: expected num_steps=0, a search without '
      'training, which can measure many assignments'
    ]
  if search.target is not None:
    return [
      f'search.max_quality_drop={drop:g} and search.target={search.target:g}: expected '
      'one of them'
    ]
  return []


def _check_rounding(config):
  if config.search.rounding != 'reconstruction':
    return []
  if not trains_nothing(config):
    return ['search.rounding=reconstruction: expected num_steps=0, a search without '
            'training, whose weights stay as they are rounded']  # fmt: skip
  if config.quantizer.calibration == 'rms':
    return ['search.rounding=reconstruction: expected quantizer.calibration=absmax or '
            'rms_absmax, which find the scales of rounded weights again']  # fmt: skip
  return []


def _check_smoothing(config):
  strength = config.search.smoothing
  if strength is None:
    return []
  if not 0 <= strength <= 1:
    return [f'search.smoothing={strength:g}: expected a number from 0 to 1, or None']
  if not trains_nothing(config):
    return [f'search.smoothing={strength:g}: expected num_steps=0, a search without '
            'training']  # fmt: skip
  return []


def _check_batches(config, num_devices):
  num_samples = config.search.num_samples if config.mode == 'search' else 1
  if min(config.batch_size, config.eval_batch_size, num_samples) < 1:
    return []  # reported as numbers
  # Devices beyond the samples split the examples of a sample.
  parts = math.lcm(num_samples, num_devices)
  problems = []
  if config.mode != 'eval' and config.batch_size % parts:
    problems.append(
      f'batch_size={config.batch_size}: expected a multiple of {parts}, for '
      f'search.num_samples={num_samples} on {num_devices} device(s)'
    )
  # Own batches are evaluated as they come.
  if config.dataset != OWN_BATCHES and config.eval_batch_size % num_devices:
    problems.append(
      f'eval_batch_size={config.eval_batch_size}: expected a multiple of the '
      f'{num_devices} devices'
    )
  return problems


def _check_fsdp(config, num_devices):
  if config.fsdp < 1:
    return []  # reported as a number
  if num_devices % config.fsdp:
    return [f'fsdp={config.fsdp}: expected a divisor of the {num_devices} device(s)']
  if config.fsdp > 1 and trains_nothing(config):
    return [
      f'fsdp={config.fsdp}: expected 1 with num_steps=0, a search without training, '
      'which keeps all parameters on every device'
    ]
  return []


def _check_image(config):
  shape, mean, stddev = config.input.image_shape, config.input.mean, config.input.stddev
  if len(shape) != 3 or min(shape) < 1 or shape[2] not in (1, 3):
    return [
      f'input.image_shape={shape}: expected (height, width, channels), with 1 or 3 '
      'channels'
    ]
  if not len(mean) == len(stddev) == shape[2] or min(stddev) <= 0:
    return [
      f'input.mean={mean}, input.stddev={stddev}: expected {shape[2]} number(s) each, '
      'one for each channel, the deviations above 0'
    ]
  return []


def _check_text(config):
  settings = config.input
  if settings.context is None:
    expected = 'expected False without input.context, since it is for texts'
    return [f'input.packed=True: {expected}'] if settings.packed else []
  of_images = {
    'input.augmentation': settings.augmentation != 'none',
    'input.erasing': settings.erasing,
    'input.mixup_alpha': settings.mixup_alpha,
    'input.cutmix_alpha': settings.cutmix_alpha,
    'optimizer.label_smoothing': config.optimizer.label_smoothing,
  }
  return [
    f'{field}={_field(config, field)}: expected its default with input.context, since '
    'it is for the classification of images'
    for field, given in of_images.items()
    if given
  ]


def _check_augmentation(config):
  magnitude = config.input.rand_augment_magnitude
  if magnitude > 10:
    return [f'input.rand_augment_magnitude={magnitude}: expected 10 or less']
  return []


def _check_delays(config):
  search, problems = config.search, []
  if config.num_steps < 1:
    return []  # reported as a number
  for operands in ('activation', 'weight'):
    delay = search[f'{operands}_delay']
    if delay >= config.num_steps:
      problems.append(
        f'search.{operands}_delay={delay}: expected fewer than '
        f'num_steps={config.num_steps}, or {operands}s are never quantized'
      )
  if search.policy_delay >= config.num_steps:
    problems.append(
      f'search.policy_delay={search.policy_delay}: expected fewer than '
      f'num_steps={config.num_steps}, or the policy never learns'
    )
  elif search.hard_budget and not (
    search.policy_delay <= search.commit_step < config.num_steps
  ):
    problems.append(
      f'search.commit_step={search.commit_step}: expected a step from '
      f'search.policy_delay={search.policy_delay} on, before '
      f'num_steps={config.num_steps}'
    )
  return problems


def _check_formats(config):
  search, problems = config.search, []
  named = [name for _, name in search.pins]
  if search.target is None:
    named.append(search.target_format)
  if search.cap_cost_model and search.cap is None:
    named.append(search.cap_format)
  for check, argument in (
    (options.parse, search.formats),
    *((options.find, name) for name in named),
  ):
    try:
      check(argument)
    except ConfigError as error:
      problems += error.problems
  return problems


def _check_latency_table(config):
  search = config.search
  for field in ('cost_model', 'cap_cost_model'):
    if search[field] == 'latency_table' and not search.latency_table:
      return [
        f'search.{field}=latency_table: expected the path of a file from python -m '
        'fliqs_jax.measure in search.latency_table'
      ]
  return []


def _check_kv_cache(config):
  search = config.search
  return [
    f'search.{field}=kv_cache: expected search.attention_products=True, since keys and '
    'values are operands of these products'
    for field in ('cost_model', 'cap_cost_model')
    if search[field] == 'kv_cache' and not search.attention_products
  ]


def _check_cap(config):
  search = config.search
  if search.cap_cost_model and not search.hard_budget:
    return [
      f'search.cap_cost_model={search.cap_cost_model!r}: expected '
      'search.hard_budget=True, whose commitment keeps the cap'
    ]
  if search.cap is not None and not search.cap_cost_model:
    return [f'search.cap={search.cap}: expected the cost in search.cap_cost_model']
  return []


def _check_decide(config):
  decide, strategy = config.search.decide, config.search.strategy
  problems = []
  if decide != 'formats' and strategy in STRATEGIES:
    able = [name for name, s in STRATEGIES.items() if s.searches_architectures]
    if strategy not in able:
      problems.append(
        f'search.strategy={strategy}: expected {", ".join(able)} for '
        f'search.decide={decide}, whose supernet trains under sampled architectures'
      )
  if not config.search.hard_budget and strategy != 'policy_gradient':
    problems.append(
      f'search.hard_budget=False: expected search.strategy=policy_gradient, since '
      f'{strategy} commits to its choices'
    )
  if decide != 'formats' and config.architecture:
    problems.append(
      f'architecture={config.architecture!r}: expected search.decide=formats, since '
      f'search.decide={decide} searches the architecture'
    )
  return problems


def _check_targets(config):
  search, problems = config.search, []
  if not search.targets:
    return problems
  serving = [name for name, s in STRATEGIES.items() if s.serves_targets]
  if search.strategy in STRATEGIES and search.strategy not in serving:
    problems.append(
      f'search.strategy={search.strategy}: expected {" or ".join(serving)} for '
      'search.targets, since its weights or samples depend on the one target'
    )
  if len(set(search.targets)) < len(search.targets):
    problems.append(f'search.targets={search.targets!r}: expected each target once')
  return problems


def _check_reward(config):
  problems = []
  if config.reward.split == 'validation' and not config.input.reward_split:
    problems.append(
      'reward.split=validation: expected held-out examples in input.reward_split, '
      "such as 'train[90%:]'"
    )
  if config.search.strategy == 'policy_gradient':
    problems += _check_policy_gradient(config)
  elif (
    config.search.num_samples == 1
    and config.search.strategy != 'uniform'
    and not trains_nothing(config)
  ):
    problems.append(
      'search.num_samples=1: expected 2 or more, since '
      f'search.strategy={config.search.strategy} compares samples on the same examples'
    )
  return problems


def _check_policy_gradient(config):
  """Returns what is wrong with the fields that REINFORCE alone has."""
  problems, reward = [], REWARDS.get(config.reward.name)
  if reward and config.reward.beta * reward.beta_sign <= 0:
    sign = 'above' if reward.beta_sign > 0 else 'below'
    problems.append(
      f'reward.beta={config.reward.beta}: expected a number {sign} 0 for the reward '
      f'{config.reward.name!r}, so that a high cost lowers it'
    )
  quality = config.reward.quality
  if reward and quality != 'accuracy' and not reward.signed_quality:
    problems.append(
      f'reward.quality={quality}: expected accuracy for the reward '
      f'{config.reward.name!r}, which multiplies the quality'
    )
  if config.controller.baseline == 'leave_one_out' and config.search.num_samples == 1:
    problems.append(
      'controller.baseline=leave_one_out: expected search.num_samples of 2 or more, '
      'or the baseline `moving`'
    )
  return problems
