"""A finished run of three layers in integers, and its exports."""

import functools
import json

from etils import epath
import pytest
from whole_runs import Smallest

from fliqs_jax import models
from fliqs_jax.exporting import deployment, exporter
from fliqs_jax.runs import evaluation, loop

FORMATS = {
  'conv': {'weights': 'int4', 'activations': 'int8'},
  'hidden': {'weights': 'int3', 'activations': 'int4'},
  'classifier': {'weights': 'int8', 'activations': 'int8'},
}


@pytest.fixture(scope='package')
def finished(tiny_config, tmp_path_factory):
  """The folder of a finished run of three layers in integers."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(models.MODELS, 'smallest', Smallest)
    folder = tmp_path_factory.mktemp('finished')
    given = folder / 'formats.json'
    given.write_text(json.dumps(FORMATS))
    config = tiny_config.copy_and_resolve_references()
    config.model.update(name='smallest', width=1.0)
    config.update(mode='train', formats=str(given))
    loop.run(config, epath.Path(folder / 'run'))
    given.unlink()  # the result alone remembers the formats
    yield folder / 'run'


@pytest.fixture(scope='package')
def run(finished):
  """Setup, state and result of that run."""
  return evaluation.finished_run(epath.Path(finished))


@pytest.fixture(scope='package')
def deployed(run):
  """The network of that run."""
  return deployment.make_deployment(*run)


@pytest.fixture(scope='package')
def exported(deployed, tmp_path_factory):
  """A function from a target to the folder of its export and the report."""
  folder = tmp_path_factory.mktemp('exports')

  @functools.cache
  def export(target):
    return folder / target, exporter.export(deployed, target, folder / target)

  return export
