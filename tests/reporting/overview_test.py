"""Overviews of networks, against published counts."""

from conftest import load_config

from fliqs_jax.reporting import overview
from fliqs_jax.runs.config import resolve


def test_parameters_of_inference_and_those_of_training_alone(capsys):
  config = resolve(load_config('inception_v3', 'imagenet'))
  config.mode = 'train'  # fixed formats: the table has no search in it
  content = overview.describe(config, 'bf16', 'bf16')
  overview.print_table(config, content)
  # Torchvision's counts without and with the auxiliary classifier.
  assert content['params'] == 23_834_568
  assert content['training_params'] == {'aux_head': 27_161_264 - 23_834_568}
  shown = capsys.readouterr().out
  assert 'inception_v3: 23,834,568 parameters, ' in shown
  assert 'In training alone: aux_head, 3,326,696 parameters' in shown
