"""The network of a finished search as it is deployed: weights, inputs, examples."""

from collections.abc import Callable, Iterator, Mapping
import functools
import operator
from typing import Any, NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fliqs_jax.errors import ConfigError
from fliqs_jax.exporting import native
from fliqs_jax.exporting.parameters import (
  KERNEL,
  QuantizedLayer,
  quantized_parameters,
  unquantized,
)
from fliqs_jax.layers.variables import FORMATS, nest
from fliqs_jax.linen.replacement import replaced_layers as linen_layers
from fliqs_jax.nnx.operators import replaced_layers as nnx_layers
from fliqs_jax.runs import network
from fliqs_jax.runs.config import OWN_BATCHES
from fliqs_jax.runs.setup import Setup
from fliqs_jax.search.space import fixed_space
from fliqs_jax.training.task import Batch, Task
from fliqs_jax.training.train_state import Arguments, TrainState

_MAX_EXAMPLES = 1024  # that outputs are compared on

Inputs = tuple[np.ndarray, ...]  # what a deployed network is called with, [B, ...] each


class Deployment(NamedTuple):
  """A searched network with its weights, and examples to compare outputs on.

  Attributes:
    apply: of the network: (variables, *args, **kwargs) -> outputs.
    plain: the same network without quantized layers; None where it is not of linen.
    arguments: from inputs to the arguments that the network is called with.
    variables: parameters and other collections, in numpy, without formats.
    layers: codes and scales, by path.
    result: what `search_result.json` holds.
    calibration: one of `calibration.LAYER_CALIBRATIONS`.
    task: what the outputs are worth.
    batches: for the comparison.
    inputs: what the network is given of each of these batches.
  """

  apply: Callable[..., Any]
  plain: nn.Module | None
  arguments: Callable[..., Arguments]
  variables: Mapping[str, Any]
  layers: Mapping[str, QuantizedLayer]
  result: Mapping[str, Any]
  calibration: str
  task: Task
  batches: tuple[Batch, ...]
  inputs: tuple[Inputs, ...]

  @property
  def unquantized(self) -> dict[str, np.ndarray]:
    """Arrays that are deployed as they are: biases, norms, embeddings."""
    return unquantized([layer.layer for layer in self.layers.values()], self.variables)

  def searched(self, *inputs: jax.Array) -> Any:
    """Returns the outputs of the network as it was searched."""
    layers = [layer.layer for layer in self.layers.values()]
    bound = fixed_space(layers, self.result['formats']).bind(np.zeros(0, np.int32))
    variables = {**self.variables, FORMATS: nest(layers, bound)}
    return self._outputs(variables, inputs)

  def deployed(
    self,
    *inputs: jax.Array,
    compute: Callable[..., Any] = native.deployed_layer,
  ) -> Any:
    """Returns the outputs of the network that computes with codes.

    Args:
      *inputs: `[B, ...]` each.
      compute: what layers compute, with the arguments of `native.deployed_layer`.
    """

    def layer_outputs(path, x, w, product):
      layer = self.layers[path]
      if w.shape != layer.codes.shape:
        raise ConfigError(
          f'layer {path!r} multiplies by a part {w.shape} of its weights '
          f'{layer.codes.shape}, as in a scan over them: such a network cannot '
          'be exported'
        )
      return compute(layer, self.calibration, x, product)

    with linen_layers(layer_outputs), nnx_layers(layer_outputs):
      return self._outputs(self._without_kernels(), inputs)

  def _outputs(self, variables, inputs):
    arguments = self.arguments(*inputs)
    return self.apply(variables, *arguments.args, **arguments.kwargs)

  def _without_kernels(self):
    """Variables whose quantized kernels are zeros that no constant is kept for."""
    layers = {tuple(filter(None, path.split('/'))) for path in self.layers}

    def blank(path, leaf):
      *place, name = (key.key for key in path)
      if name == KERNEL and tuple(place) in layers:
        return jnp.broadcast_to(jnp.zeros((), leaf.dtype), leaf.shape)
      return leaf

    params = jax.tree_util.tree_map_with_path(blank, self.variables['params'])
    return {**self.variables, 'params': params}


def make_deployment(
  setup: Setup, state: TrainState, result: Mapping[str, Any]
) -> Deployment:
  """Returns the network of a run with its weights and examples to compare on.

  Args:
    setup: of the run, with its data.
    state: its parameters and statistics.
    result: what `search_result.json` holds.

  Raises:
    ConfigError: where the layers cannot be expressed by codes and one scale of each
      input, or there are no examples.
  """
  # Runs of versions before this choice have one scale for each tensor.
  if setup.config.quantizer.get('activation_scale', 'tensor') != 'tensor':
    raise ConfigError(
      'the scales of activations are set for each token: expected a run with '
      'quantizer.activation_scale=tensor, since no other can be exported'
    )
  variables = jax.device_get({'params': state.params, **state.model_stats})
  calibration = setup.config.quantizer.calibration
  layers = quantized_parameters(
    setup.space.layers, variables, result['formats'], calibration
  )
  batches = tuple(_first_batches(setup))
  if not batches:
    raise ConfigError('no example is left in the evaluation batches to compare on')
  split = _raw_images if _normalizes_images(setup) else _network_arguments
  inputs, arguments = split(setup.task, batches)
  return Deployment(
    apply=setup.model.apply,
    plain=_plain(setup),
    arguments=arguments,
    variables=variables,
    layers=layers,
    result=result,
    calibration=calibration,
    task=setup.task,
    batches=batches,
    inputs=inputs,
  )


def _plain(setup):
  """Returns the network without quantized layers."""
  if setup.config.dataset == OWN_BATCHES:
    model = getattr(setup.model, 'model', None)
    return model if isinstance(model, nn.Module) else None
  choose = network.choose_architecture(setup.config, setup.architecture)
  return network.build_model(setup.config, quantized=False, choose=choose)


def _first_batches(setup) -> Iterator[Batch]:
  left = _MAX_EXAMPLES
  for batch in setup.data.evaluation(None):
    batch = _counted_examples(setup.task, batch)
    first = operator.itemgetter(slice(left))
    yield jax.tree.map(first, batch)
    left -= jax.tree.leaves(batch)[0].shape[0]
    if left <= 0:
      return


def _counted_examples(task, batch):
  if task.mask is None:
    return batch
  counted = np.asarray(task.mask(batch))
  return jax.tree.map(lambda a: np.asarray(a)[counted], batch)


def _normalizes_images(setup):
  """Returns whether images in 0 … 255 are prepared before the network sees them."""
  config = setup.config
  return config.dataset != OWN_BATCHES and config.input.get('context') is None


def _raw_images(task, batches):
  def arguments(image):
    return task.arguments({'image': image}, False)

  return tuple((batch['image'],) for batch in batches), arguments


def _network_arguments(task, batches):
  called = [task.arguments(batch, False) for batch in batches]
  kwargs = called[0].kwargs
  inputs = tuple(tuple(map(np.asarray, call.args)) for call in called)
  return inputs, lambda *args: Arguments(args, kwargs)


def symbolic_shapes(inputs: Inputs) -> tuple[jax.ShapeDtypeStruct, ...]:
  """Returns the shapes of inputs in a batch of any size."""
  (batch,) = jax.export.symbolic_shape('batch')
  return tuple(jax.ShapeDtypeStruct((batch, *a.shape[1:]), a.dtype) for a in inputs)


def of_any_batch(
  function: Callable[..., Any], shapes: tuple[jax.ShapeDtypeStruct, ...]
) -> Callable[..., Any]:
  """Returns a function that can be traced with a batch of a size that is not known.

  Networks that ask for the size as a number, as `x.reshape(len(x), -1)` does, are
  called with one example at a time, all of them mapped.

  Args:
    function: of inputs.
    shapes: from `symbolic_shapes`.

  Raises:
    ConfigError: where it cannot be traced either way.
  """

  def one(*inputs):
    outputs = function(*(a[None] for a in inputs))
    return jax.tree.map(functools.partial(jnp.squeeze, axis=0), outputs)

  reasons = []
  for candidate in (function, jax.vmap(one)):
    try:
      jax.eval_shape(candidate, *shapes)
      return candidate
    except ConfigError:
      raise
    except Exception as error:  # a network is code and raises what it likes
      reasons.append((str(error).splitlines() or [type(error).__name__])[0])
  raise ConfigError(
    'the network cannot be traced for a batch of any size: ' + '; '.join(reasons)
  )
