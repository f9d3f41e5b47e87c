"""Results of runs from Python: network, weights, formats, and the files of the run."""

from collections.abc import Mapping
import dataclasses
import os
from typing import Any

from flax import nnx
import jax

from fliqs_jax.errors import ConfigError
from fliqs_jax.exporting import deployment, exporter
from fliqs_jax.layers.coverage import Coverage
from fliqs_jax.linen import interception
from fliqs_jax.reporting import notebook, terminal
from fliqs_jax.runs import distributed, evaluation, files
from fliqs_jax.runs import workdir as workdir_lib
from fliqs_jax.runs.jax_settings import usual_settings
from fliqs_jax.runs.setup import Setup


class Front(dict[str, 'Result']):
  """Results by the text of their target; shown as a table of costs and qualities."""

  def __repr__(self) -> str:
    return terminal.to_text(*self._parts())

  def _repr_html_(self) -> str:
    return notebook.to_html(*self._parts())

  def _parts(self):
    return terminal.front_parts({name: r.content for name, r in self.items()})


@dataclasses.dataclass(frozen=True, repr=False)
class Result:
  """Result of a run: the network, its weights, its formats, and the record.

  The formats are those that a search has found, or those that a training was given.

  Attributes:
    model: the network with these formats. Of an NNX module, an NNX module with the
      trained weights, as for evaluation. Of a linen module, what computes with
      them in `model.apply(variables, ...)`; the user's own `apply` takes
      `variables['params']` without formats.
    variables: parameters, statistics and other collections, and `formats`.
    content: what `search_result.json` holds.
    history: a dict of scalars and of the policy for each logging step.
    coverage: which layers have formats, and why others have none.
    workdir: the run's folder.
  """

  model: interception.Searchable | nnx.Module
  variables: Mapping[str, Any]
  content: Mapping[str, Any]
  history: list[dict[str, Any]]
  coverage: Coverage
  workdir: str
  _setup: Setup
  _temporary: files.TemporaryFolder | None

  def __repr__(self) -> str:
    return terminal.to_text(*terminal.result_parts(self.content, self.workdir))

  def _repr_html_(self) -> str:
    return notebook.to_html(*terminal.result_parts(self.content, self.workdir))

  @property
  def formats(self) -> Mapping[str, Mapping[str, str]]:
    """The formats, `{module path: {'weights': name, 'activations': name}}`."""
    return self.content['formats']

  @property
  def cost(self) -> float:
    """The cost under these formats, in `content['cost_unit']`."""
    return self.content['cost']

  @property
  def target(self) -> float | None:
    """The target that was searched for, in the same unit.

    None of a training, and of a search with `max_quality_drop`.
    """
    return self.content['target']

  @property
  def policy(self) -> Mapping[str, Mapping[str, float]]:
    """The policy, `{decision: {format: probability}}`; empty of a training."""
    return self.content['policy']

  @property
  def eval(self) -> Mapping[str, float]:
    """Means over the evaluation's examples, and their number `num_examples`."""
    return self.content['eval']

  def save(self, folder: os.PathLike | str) -> None:
    """Copies the run's files into a new folder, a workdir like any other.

    Of several processes, process 0 does; of them all must call it.

    Raises:
      ConfigError: where the folder exists and is not empty, or cannot be written;
        nothing is left of it then.
    """
    problem = None
    if jax.process_index() == 0:
      problem = files.copy_folder(
        files.to_path(self.workdir),
        files.to_path(folder, 'folder'),
        leave_out=(workdir_lib.LOCK_FILE,),
      )
    distributed.raise_everywhere(problem)

  @usual_settings()
  def export(
    self, to: str, folder: os.PathLike | str, fold_batch_norm: bool = False
  ) -> dict[str, Any]:
    """Exports the network, loads it again, and compares the outputs.

    Args:
      to: one of `exporting.exporter.TARGETS`.
      folder: to be made; an earlier export in it is replaced.
      fold_batch_norm: whether batch normalisation is folded into the layers before it,
        of which the outputs differ by float32 rounding alone.

    Returns:
      What `report.json` in the folder holds: examples of the evaluation batches,
      differences, means of the evaluation, bytes.

    Raises:
      ConfigError: where the target cannot express the network, or the folder cannot be
        written.
      Mismatch: where what was exported computes something else; no folder is left.
    """
    if jax.process_count() > 1:
      raise ConfigError(
        f'export in {jax.process_count()} processes: expected one, in which the same '
        'call with this workdir returns the result without a further step'
      )
    folder = files.to_path(folder, 'folder')
    exporter.check(to, folder, fold_batch_norm)
    state, _ = evaluation.restored_state(self._setup, files.to_path(self.workdir))
    deployed = deployment.make_deployment(self._setup, state, self.content)
    deployed = deployed._replace(folds_batch_norm=fold_batch_norm)
    return exporter.export(deployed, to, folder)
