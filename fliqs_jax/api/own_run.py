"""A run from Python: the user's network and batches, checked, and its result."""

from collections.abc import Callable
import sys
from typing import NamedTuple

from etils import epath
import jax

from fliqs_jax.api.own_network import check_network, describe_model
from fliqs_jax.api.results import Result
from fliqs_jax.data import batches
from fliqs_jax.errors import ConfigError, Problems
from fliqs_jax.layers.coverage import Coverage
from fliqs_jax.layers.variables import FORMATS, nest
from fliqs_jax.runs import distributed, evaluation, files, preparation
from fliqs_jax.runs import result as result_lib
from fliqs_jax.runs import setup as setup_lib
from fliqs_jax.runs import workdir as workdir_lib
from fliqs_jax.runs.network import Network, own_variables
from fliqs_jax.runs.setup import Data, Setup
from fliqs_jax.runs.validation import OWN_BATCHES


class OwnRun(NamedTuple):
  """Network, batches and folder of a run from Python: all but its config."""

  network: Network
  coverage: Coverage
  data: Callable[[Setup], Data]
  folder: epath.Path
  temporary: files.TemporaryFolder | None


def own_run(config, model, train_batches, eval_batches, scores, variables, workdir):
  """Looks at the network and the batches, and writes into the config what they say."""
  if jax.process_count() > 1 and workdir is None:
    raise ConfigError(
      f'workdir={workdir!r} in {jax.process_count()} processes: expected a folder that '
      'all of them see, which process 0 writes'
    )
  folder = workdir if workdir is None else files.to_path(workdir, 'workdir')
  first, train_batches = batches.first_batch(train_batches, 'train_batches')
  evaluated, eval_batches = batches.first_batch(eval_batches, 'eval_batches')
  _describe(config, model, first)
  network, coverage = check_network(config, model, scores, first, evaluated)
  distributed.check_alike(
    {
      'config and arguments': result_lib.config_to_json(config),
      'train_batches': first,
      'eval_batches': evaluated,
      'model': own_variables(network.model, network.example),
      'variables': variables,
    }
  )
  check = network.task.check
  batches.check_list('train_batches', train_batches, first, check, of_one_size=True)
  batches.check_list('eval_batches', eval_batches, evaluated, check)
  if jax.process_index() == 0:
    print(coverage, file=sys.stderr)
  temporary = None
  if folder is None:
    temporary = files.TemporaryFolder()
    folder = temporary.path
  return OwnRun(
    network=network,
    coverage=coverage,
    data=lambda setup: _data(setup, train_batches, eval_batches, first, evaluated),
    folder=folder,
    temporary=temporary,
  )


def _describe(config, model, batch):
  """Writes into a config what it says of a user's network and batches."""
  config.batch_size = batches.batch_size(batch, 'train_batches')
  config.dataset = OWN_BATCHES
  config.model = describe_model(model)


def prepare(config, own, folder, variables):
  """Returns what a run needs, after all checks."""
  problems, network = Problems(), own.network
  formats = problems.attempt(preparation.fixed_formats, config)
  problems.raise_any()
  devices = jax.device_count()
  setup = problems.attempt(setup_lib.build, config, devices, formats, network)
  start = preparation.attempt_start(problems, config, setup, variables)
  problems.attempt(workdir_lib.check, config, folder, False)
  problems.attempt(workdir_lib.check_layers, network.layers, folder)
  problems.raise_any()
  return setup._replace(start=start, data=own.data(setup))


def _data(setup, train_batches, eval_batches, first, evaluated):
  num_samples, size = setup.num_samples, setup.config.batch_size
  check = batches.alike('train_batches', first, setup.task.check)
  return Data(
    lambda seed, sharding: batches.TrainBatches(
      train_batches, num_samples, size, check
    ),
    evaluation_data(setup, eval_batches, evaluated),
    whole=True,
  )


def evaluation_data(setup, eval_batches, evaluated):
  """Returns the function that yields checked batches, as `Data.evaluation`."""
  check = batches.alike('eval_batches', evaluated, setup.task.check)
  return lambda sharding: batches.eval_batches(eval_batches, check)


def to_result(own, setup, folder, content):
  """Returns the result of a run that has finished in a folder."""
  model, final = own.network.model, _final_variables(setup, folder, content['formats'])
  return Result(
    model=model.merge(final),
    variables=final,
    content=content,
    history=workdir_lib.read_history(folder),
    coverage=own.coverage,
    workdir=str(folder.absolute()),  # wherever the process goes from here
    _setup=setup,
    _temporary=own.temporary,
  )


def _final_variables(setup, folder, formats):
  """Returns what the found network computes with, in numpy."""
  state, _ = evaluation.restored_state(setup, folder)
  choices = setup.space.choices_of(formats)
  formats = nest(setup.space.layers, setup.space.bind(choices))
  variables = {'params': state.params, **state.model_stats, FORMATS: formats}
  return distributed.to_host(variables)
