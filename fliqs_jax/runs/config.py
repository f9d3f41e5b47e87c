"""The fields of a config, their defaults, and what follows from others."""

import ml_collections
from ml_collections import config_dict

from fliqs_jax.errors import ConfigError
from fliqs_jax.runs import targets, validation
from fliqs_jax.search import devices, options
from fliqs_jax.search.strategies import (
  FIXED_FORMATS,
  STRATEGIES,
  default_strategy,
)


def default_config() -> ml_collections.ConfigDict:
  """Returns the config that the files in `configs/` start from: all fields there are.

  Fields that are None follow from others; `resolve` fills them in.
  """
  integer = lambda: config_dict.placeholder(int)
  return ml_collections.ConfigDict(
    {
      'mode': 'search',  # or train (fixed formats), eval (a checkpoint)
      'seed': 0,
      'num_steps': 1000,  # 0 searches the formats of given weights without training
      'batch_size': 64,  # examples a step, over all samples and devices
      'eval_batch_size': 256,
      'dataset': 'digits',  # a TFDS name
      'num_classes': 10,
      'dtype': 'float32',  # of the computation; or bfloat16
      # For train and eval: a format for all layers, float32 for none, or the path of
      # a formats.json (assignments.py) or a search_result.json, or what such a file
      # holds, {"head": "int8", ".*": "int4"}. In eval, empty takes the checkpoint's.
      'formats': '',
      # The path of a search_result.json whose architecture to build, where it is not
      # searched; empty for that of config.formats, else the standard one.
      'architecture': '',
      'checkpoint': '',  # for eval: another workdir than --workdir
      # Variables to start from: a workdir, or an Orbax checkpoint with `params` and, if
      # it has them, `batch_stats`. Empty for random ones.
      'init_from': '',
      'checkpoint_every': 500,
      # Devices over which each parameter, its optimizer's state and its averages are
      # split, a divisor of their number; 1 keeps all of them on every device.
      'fsdp': 1,
      'max_skipped_steps': 0,  # in a row, where a loss or gradient is not finite
      'compilation_cache': '~/.cache/fliqs_jax',  # folder; empty for none
      'log_every': 50,
      'eval_every': 0,  # steps between evaluations meanwhile; 0 for one at the end
      'model': {'name': 'resnet18', 'width': 1.0},  # and options of that network
      'input': {
        'data_dir': '',  # of TFDS; empty for its default
        'image_shape': (8, 8, 1),
        'context': integer(),  # bytes that a language model sees; None for images
        # Whether short texts are followed by others, up to a full window, in training.
        'packed': False,
        'train_split': 'train',
        'eval_split': 'test',
        'reward_split': '',  # held-out examples for reward.split='validation'
        'augmentation': 'none',  # or crop_flip, or rand_augment after crop_flip
        'rand_augment_magnitude': 9.0,  # up to 10
        'erasing': 0.0,  # probability of a box of noise
        'mixup_alpha': 0.0,  # of the Beta distribution; 0 for no mixup
        'cutmix_alpha': 0.0,
        'mean': (0.5,),  # per channel, of pixels in [0, 1]
        'stddev': (0.5,),
        'num_threads': 2,
      },
      'optimizer': {
        'name': 'sgd',  # or adamw, rmsprop
        'learning_rate': 0.1,  # peak of a cosine schedule
        'warmup_steps': integer(),  # default: 5 % of num_steps
        'momentum': 0.9,
        'square_decay': 0.999,  # adamw's and rmsprop's average of squared gradients
        'epsilon': 1e-8,  # of adamw and rmsprop
        'weight_decay': 1e-4,  # on kernels alone
        'label_smoothing': 0.0,
        'auxiliary_weight': 0.4,  # of the loss of a network's auxiliary heads
      },
      'quantizer': {
        'calibration': 'rms',  # or absmax, or rms_absmax: of activations and weights
        'momentum': 0.95,  # of the activations' statistics
        'activation_scale': 'tensor',  # or token: for each row along the contraction
      },
      'search': {
        # A name of `search.strategies`; default: actor_critic, or policy_gradient where
        # the architecture is decided.
        'strategy': config_dict.placeholder(str),
        'decide': 'formats',  # or architecture (in one format), or both
        # A space's name, a comma-separated list (of pairs too, WEIGHTS:ACTIVATIONS), or
        # `device`: what search.device runs natively, and faster than bf16, and bf16.
        'formats': 'int_small',
        # Or separate, weights, or pairs: those that search.device multiplies natively.
        'weights_and_activations': 'tied',
        # Whether the products inside attention, QKᵀ and AV, are decisions too; of own
        # networks, from Python.
        'attention_products': False,
        # Regexes on whole module paths that tie layers, and names: qkv, gate_up,
        # residual.
        'groups': (),
        'pins': (),  # pairs (regex, format)
        'num_samples': 4,
        'cost_model': 'bops',
        'target': config_dict.placeholder(float),  # absolute; wins where given
        'target_format': 'int4',  # or this multiple of a uniform model's cost
        'target_scale': 1.0,
        # Several targets of one supernet, each FORMAT, SCALE*FORMAT or a number; the
        # index of the one that a run finishes for, None for all of them.
        'targets': (),
        'target_index': integer(),
        # Without training, the most quality to lose in place of a target: points of
        # accuracy, bits per byte, or the quality's own unit.
        'max_quality_drop': config_dict.placeholder(float),
        # Without training, how often formats are swapped as long as that measures
        # better; each time takes as long as the first measurement of all formats.
        'refinement_rounds': 2,
        # Of weights, without training: nearest, or reconstruction of what layers
        # compute on the calibration batches.
        'rounding': 'nearest',
        # Without training, how far large channels of the inputs of layers are made
        # small at the expense of their weights: from 0 to 1, None for not at all.
        'smoothing': config_dict.placeholder(float),
        'cap_cost_model': '',  # a second cost that the commitment keeps; empty for none
        'cap': config_dict.placeholder(float),  # absolute; wins where given
        'cap_format': 'int4',  # or this multiple of a uniform model's cost
        'cap_scale': 1.0,
        # Formats that it only emulates are warned of. Of the cost roofline,
        # formats=device and pairs; tpu_v5e where these need one and none is named.
        'device': config_dict.placeholder(str),
        'latency_table': '',  # path, of the cost model latency_table
        # First steps with quantized weights, with quantized activations, and of the
        # policy, and that of the commitment; the defaults are the strategy's.
        'weight_delay': integer(),
        'activation_delay': integer(),
        'policy_delay': integer(),
        'commit_step': integer(),
        'hard_budget': True,  # commit to the best formats within the target
        # Batches that re-estimate batch norm at the end, and that calibrate and measure
        # where num_steps=0.
        'statistics_batches': 50,
      },
      'reward': {
        'name': 'absolute',
        # accuracy or minus_loss; of a language model, minus_bits_per_byte. Default: the
        # accuracy with policy_gradient, else minus_loss.
        'quality': config_dict.placeholder(str),
        'beta': 1.0,  # negative for the exponential rewards
        'split': 'train',  # or validation
      },
      'controller': {
        'learning_rate': 5e-2,
        # leave_one_out or moving; default: the first, where there are several samples
        'baseline': config_dict.placeholder(str),
        'baseline_momentum': 0.95,
        'entropy_schedule': 'cosine',
        'entropy_weight': 0.1,  # at the end
      },
    }
  ).lock()


def complete(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """Returns the config of a run, of an earlier version too, with all fields."""
  completed = default_config()
  completed.model = config.get('model', completed.model)
  with completed.unlocked():
    completed.update(config)
  return completed


def resolve(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """Returns a copy in which the fields that follow from others are filled in.

  Raises:
    ConfigError: where a field has no value of its type, which a config that was copied
      or given in Python may not know, the device has no fast formats, or a pair of
      formats is none that it multiplies.
  """
  config = config.copy_and_resolve_references()
  if problems := validation.check_types(config, default_config()):
    raise ConfigError(*problems)
  search, controller = config.search, config.controller
  if search.targets:
    _resolve_target(search)
  if search.device is None and _needs_device(search):
    search.device = devices.DEFAULT
  if search.formats == 'device':
    search.formats = ','.join(devices.fast_formats(search.device))
  if search.weights_and_activations == 'pairs':
    given = options.parse(search.formats)
    search.formats = ','.join(devices.native_pairs(search.device, given))
  if config.optimizer.warmup_steps is None:
    config.optimizer.warmup_steps = int(0.05 * config.num_steps)
  if search.strategy is None:
    search.strategy = default_strategy(search.decide != 'formats')
  if validation.trains_nothing(config):
    search.num_samples = 1  # nothing is sampled
  _resolve_delays(config)
  if config.reward.quality is None:
    config.reward.quality = _default_quality(config)
  if controller.baseline is None:
    controller.baseline = 'leave_one_out' if search.num_samples > 1 else 'moving'
  return config


def _needs_device(search):
  return (
    'roofline' in (search.cost_model, search.cap_cost_model)
    or search.formats == 'device'
    or search.weights_and_activations == 'pairs'
  )


def _resolve_target(search):
  """Fills in the target that the index of a front stands for, by default the first."""
  search.targets = targets.split(search.targets)
  parsed = []
  for text in search.targets:
    try:
      parsed.append(targets.parse(text))
    except ConfigError as error:
      raise ConfigError(f'search.targets: target {text!r}: {error}') from None
  index = search.target_index or 0
  if not 0 <= index < len(parsed):
    raise ConfigError(
      f'search.target_index={index}: expected one from 0 to {len(parsed) - 1}, of '
      f'search.targets={search.targets!r}'
    )
  search.update(parsed[index])


def _resolve_delays(config):
  """Fills in when the phases of a run begin, as its strategy has them."""
  search, steps = config.search, config.num_steps
  strategy = STRATEGIES.get(search.strategy)
  if config.mode == 'train' or strategy is None:  # an unknown one is reported later
    strategy = FIXED_FORMATS
  if search.policy_delay is None:
    search.policy_delay = int(strategy.policy_delay * steps)
  if search.commit_step is None:
    # However late the policy starts, it has half of what is left.
    halfway = (search.policy_delay + steps) // 2
    late = search.policy_delay > strategy.commit_step * steps
    search.commit_step = halfway if late else int(strategy.commit_step * steps)
  for field in ('weight_delay', 'activation_delay'):
    if search[field] is None:
      search[field] = int(getattr(strategy, field) * steps)


def _default_quality(config):
  if config.input.context is not None:
    return 'minus_bits_per_byte'
  return 'accuracy' if config.search.strategy == 'policy_gradient' else 'minus_loss'
