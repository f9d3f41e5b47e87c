"""Several CPU devices, a prepared dataset, and configs that run in seconds."""

import functools
import gc
import importlib.util
import os
import pathlib

# Before JAX is imported, and for the processes that tests start too: compiling is what
# takes the time. The older emitters of XLA's fusions take half of that of the newer.
os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['JAX_DISABLE_MOST_OPTIMIZATIONS'] = '1'
os.environ['XLA_FLAGS'] = (
  '--xla_cpu_use_fusion_emitters=false --xla_cpu_multi_thread_eigen=false'
  ' --xla_cpu_parallel_codegen_split_count=1'
)

import jax
import pytest

from fliqs_jax import models
from fliqs_jax.models import resnet

jax.config.update('jax_num_cpu_devices', 2)
# Tracing leaves few cycles, and looking for them took an eighth of the time.
gc.set_threshold(20_000, 20, 20)

# A network of four layers, because what takes time here is compiling.
TINY_LAYERS = 4
models.MODELS['tiny'] = functools.partial(
  resnet.ResNet, stage_sizes=(1,), block=resnet.BasicBlock
)

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope='session', autouse=True)
def compilation_cache(tmp_path_factory, worker_id):
  """All workers and the processes that they start share what they compile."""
  folder = tmp_path_factory.getbasetemp()
  if worker_id != 'master':
    folder = folder.parent
  for name, value in (
    ('jax_compilation_cache_dir', str(folder / 'compiled')),
    ('jax_persistent_cache_min_compile_time_secs', 0.1),
  ):
    jax.config.update(name, value)
    os.environ[name.upper()] = str(value)


@pytest.fixture(scope='session')
def data_dir(tmp_path_factory):
  """A TFDS folder with the digits in it."""
  from fliqs_jax.data import pipeline as input_pipeline

  folder = tmp_path_factory.mktemp('tfds')
  config = load_config('resnet18', 'digits')
  config.input.data_dir = str(folder)
  input_pipeline.prepare(config, input_pipeline.find_builder(config))
  return folder


def load_config(name, variant):
  """Returns the config that `--config=configs/name.py:variant` names."""
  path = ROOT / 'configs' / f'{name}.py'
  spec = importlib.util.spec_from_file_location(f'config_{name}', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config(variant)


@pytest.fixture(scope='session')
def tiny_config(data_dir):
  """A search on the digits that takes seconds: 12 steps of a tiny residual network."""
  config = load_config('resnet18', 'digits')
  config.input.data_dir = str(data_dir)
  config.model.update(name='tiny', width=0.0625)
  config.num_steps = 12
  config.batch_size = 32
  config.eval_batch_size = 128
  config.checkpoint_every = 4
  config.log_every = 3
  config.search.strategy = 'policy_gradient'
  config.search.num_samples = 2
  config.search.statistics_batches = 2
  return config


@pytest.fixture(scope='session')
def text_config(data_dir):
  """A search on Python's library that takes seconds: 8 steps of one narrow block."""
  from fliqs_jax.data import pipeline

  config = load_config('transformer_lm', 'stdlib')
  config.input.update(data_dir=str(data_dir), context=16)
  config.model.update(hidden_size=16, depth=1, num_heads=2)
  config.num_steps, config.checkpoint_every, config.log_every = 8, 4, 2
  config.batch_size, config.search.num_samples = 8, 2
  pipeline.prepare(config, pipeline.find_builder(config))
  return config
