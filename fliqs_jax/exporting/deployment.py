"""The network of a finished search as it is deployed: weights, inputs, examples."""

from collections.abc import Callable, Iterator, Mapping, Sequence
import functools
import operator
from typing import Any, NamedTuple

from flax import linen as nn
from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from fliqs_jax.errors import ConfigError
from fliqs_jax.exporting import native, weights
from fliqs_jax.exporting.parameters import (
  KERNEL,
  QuantizedLayer,
  quantized_parameters,
  unquantized,
)
from fliqs_jax.layers.layer import PAIR, Layer
from fliqs_jax.layers.parameter_products import OPERATOR
from fliqs_jax.layers.replacement import replaced_layers
from fliqs_jax.layers.variables import FORMATS, nest
from fliqs_jax.numerics.formats import find_format
from fliqs_jax.runs import network
from fliqs_jax.runs.setup import Setup
from fliqs_jax.runs.validation import OWN_BATCHES
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
    pairs: the products of two activations, inside attention; computed as in the search.
    result: what `search_result.json` holds.
    task: what the outputs are worth.
    batches: for the comparison.
    inputs: what the network is given of each of these batches.
    own_weights: what layers multiply by that is not their kernel, by path.
    replaced: the parameters that are read for such weights alone.
    folds_batch_norm: whether exports fold batch normalisation into layers.
  """

  apply: Callable[..., Any]
  plain: nn.Module | None
  arguments: Callable[..., Arguments]
  variables: Mapping[str, Any]
  layers: Mapping[str, QuantizedLayer]
  pairs: tuple[Layer, ...]
  result: Mapping[str, Any]
  task: Task
  batches: tuple[Batch, ...]
  inputs: tuple[Inputs, ...]
  own_weights: Mapping[str, np.ndarray]
  replaced: frozenset[str] = frozenset()
  folds_batch_norm: bool = False

  @property
  def unquantized(self) -> dict[str, np.ndarray]:
    """Arrays that are deployed as they are: biases, norms, embeddings."""
    return unquantized(self._all_layers, self.variables, self.replaced)

  def uniform(self, name: str) -> 'Deployment':
    """Returns the same network with one format in all layers.

    Layers that are shorter than the format's blocks keep their own.
    """
    block, formats = find_format(name).block, dict(self.result['formats'])
    for layer in self._all_layers:
      if not block or block.size <= layer.contraction_length:
        formats[layer.path] = {'weights': name, 'activations': name}
    some = next(iter(self.layers.values()))
    layers = quantized_parameters(
      self._all_layers,
      self.variables,
      formats,
      some.calibration,
      some.shared_scale,
      self.own_weights,
    )
    return self._replace(layers=layers, result={**self.result, 'formats': formats})

  def searched(self, *inputs: jax.Array) -> Any:
    """Returns the outputs of the network as it was searched."""
    bound = self._formats(self._all_layers)
    return self.outputs({**self.variables, FORMATS: bound}, inputs)

  def deployed(
    self,
    *inputs: jax.Array,
    compute: Callable[..., Any] = native.deployed_layer,
    others: Mapping[str, jax.Array] | None = None,
  ) -> Any:
    """Returns the outputs of the network that computes with codes.

    Args:
      *inputs: `[B, ...]` each.
      compute: what layers compute, with the arguments of `native.deployed_layer`.
      others: the arrays of `unquantized` by name; by default those of the network.
    """

    def layer_outputs(path, x, w, product):
      layer = self.layers[path]
      if w.shape != layer.layer.kernel_shape:
        raise ConfigError(
          f'layer {path!r} multiplies by a part {w.shape} of its weights '
          f'{layer.codes.shape}: such a network cannot be exported'
        )
      element = w.ravel()[0].astype(jnp.int32) if layer.stack else None
      return compute(layer, x, product, element)

    variables = self._without_kernels(others or {})
    # Products are known by their formats alone.
    if named := [layer for layer in self._all_layers if _is_product(layer)]:
      variables[FORMATS] = self._formats(named)
    with replaced_layers(layer_outputs):
      return self.outputs(variables, inputs)

  @property
  def _all_layers(self):
    return (*(layer.layer for layer in self.layers.values()), *self.pairs)

  def _formats(self, layers):
    formats = {layer.path: self.result['formats'][layer.path] for layer in layers}
    bound = fixed_space(layers, formats).bind(np.zeros(0, np.int32))
    return nest(layers, bound)

  def outputs(self, variables: Mapping[str, Any], inputs: Sequence[jax.Array]) -> Any:
    """Returns the outputs of the network with other variables."""
    arguments = self.arguments(*inputs)
    return self.apply(variables, *arguments.args, **arguments.kwargs)

  def _without_kernels(self, others):
    """Variables whose quantized kernels are numbers that no constant is kept for.

    The numbers are those of the elements of a stack, so that a network that scans over
    it tells by its part of the weights which of them computes; zeros of other layers.

    Args:
      others: arrays in the place of the network's own, by the names of `unquantized`.
    """

    def place(collection, path, leaf):
      names = [key.key for key in path]
      name = '/'.join(names)
      if collection == 'params' and name in self.replaced:
        stack = self.layers[name].stack if name in self.layers else ()
        return weights.numbers(stack, leaf.shape).astype(leaf.dtype)
      layer = self.layers.get('/'.join(names[:-1])) if collection == 'params' else None
      if layer is None or names[-1] != KERNEL:
        prefix = [] if collection == 'params' else [collection]
        return others.get('/'.join([*prefix, *names]), leaf)
      return weights.numbers(layer.stack, leaf.shape).astype(leaf.dtype)

    return {
      collection: jax.tree_util.tree_map_with_path(
        functools.partial(place, collection), tree
      )
      for collection, tree in self.variables.items()
    }


def make_deployment(
  setup: Setup, state: TrainState, result: Mapping[str, Any]
) -> Deployment:
  """Returns the network of a run with its weights and examples to compare on.

  Args:
    setup: of the run, with its data.
    state: its parameters and statistics.
    result: what `search_result.json` holds.

  Raises:
    ConfigError: where the layers cannot be expressed by codes and scales, or there are
      no examples.
  """
  variables = jax.device_get({'params': state.params, **state.model_stats})
  batches = tuple(_first_batches(setup))
  if not batches:
    raise ConfigError('no example is left in the evaluation batches to compare on')
  split = _raw_images if _normalizes_images(setup) else _network_arguments
  inputs, arguments = split(setup.task, batches)
  quantizer = setup.config.quantizer
  return deploy(
    setup.model,
    _plain(setup),
    arguments,
    variables,
    setup.space.layers,
    result,
    inputs,
    calibration=quantizer.calibration,
    # Runs of versions before this choice have one scale for each tensor.
    shared_scale=quantizer.get('activation_scale', 'tensor'),
    task=setup.task,
    batches=batches,
  )


def deploy(
  model: Any,
  plain: nn.Module | None,
  arguments: Callable[..., Arguments],
  variables: Mapping[str, Any],
  layers: Sequence[Layer],
  result: Mapping[str, Any],
  inputs: Sequence[Inputs],
  calibration: str = 'rms',
  shared_scale: str = 'tensor',
  task: Task | None = None,
  batches: Sequence[Batch] = (),
) -> Deployment:
  """Returns a network with its weights and formats.

  Args:
    model: the network with quantized layers.
    plain: as in `Deployment`.
    arguments: as in `Deployment`.
    variables: as in `Deployment`.
    layers: of the network.
    result: of which the formats are read.
    inputs: as in `Deployment`.
    calibration: as in `quantized_parameters`.
    shared_scale: as in `quantized_parameters`.
    task: as in `Deployment`; None where nothing is scored.
    batches: as in `Deployment`.

  Raises:
    ConfigError: where the layers cannot be expressed by codes and scales, or the
      outputs are of a class of the user's.
  """
  own_weights = weights.find(model, layers, variables, arguments(*inputs[0]))
  given = Deployment(
    apply=model.apply,
    plain=plain,
    arguments=arguments,
    variables=variables,
    layers=quantized_parameters(
      layers, variables, result['formats'], calibration, shared_scale, own_weights
    ),
    pairs=tuple(layer for layer in layers if layer.kind == PAIR),
    result=result,
    task=task,
    batches=tuple(batches),
    inputs=tuple(inputs),
    own_weights=own_weights,
  )
  _check_outputs(given)
  return given._replace(replaced=_parameters_of_weights(given))


def _check_outputs(deployment):
  """Raises ConfigError where outputs are of classes that other programs lack."""
  found = []

  def trace(*inputs):
    found.append(deployment.searched(*inputs))
    return ()

  jax.eval_shape(trace, *deployment.inputs[0])
  if names := sorted(set(_own_classes(found[0]))):
    raise ConfigError(
      f'the network returns {", ".join(names)}: expected arrays, or tuples, lists and '
      'dicts of them, as of a module around it that returns these'
    )


def _own_classes(outputs):
  """Yields the names of classes that are neither containers nor arrays."""
  if type(outputs) in (dict, list, tuple):
    for part in outputs.values() if isinstance(outputs, dict) else outputs:
      yield from _own_classes(part)
  elif outputs is not None and not isinstance(outputs, jax.Array | np.ndarray):
    yield type(outputs).__name__


def _is_product(layer):
  """Returns whether a layer is a product by itself, and no module of Flax."""
  return layer.kind == PAIR or layer.operator == OPERATOR


def _parameters_of_weights(deployment):
  """Returns the parameters that the network reads for its own weights alone.

  Raises:
    ConfigError: where a stacked one is read otherwise too.
  """
  if not deployment.own_weights:
    return frozenset()
  params = traverse_util.flatten_dict(deployment.variables['params'], sep='/')
  names = sorted(deployment.unquantized.keys() & params.keys())

  def read(network):
    given = {name: params[name] for name in names}
    exported = jax.export.export(jax.jit(network))(given, *deployment.inputs[0])
    return {names[i] for i in exported.module_kept_var_idx if i < len(names)}

  def floats(given, *inputs):
    variables = deployment.variables
    own = weights.map_named(given.get, variables['params'])
    return deployment.outputs({**variables, 'params': own}, inputs)

  def codes(given, *inputs):
    return deployment.deployed(*inputs, compute=first_element, others=given)

  def first_element(layer, x, product, element):
    del element  # which is read from the weights
    layer = layer.element(0) if layer.stack else layer
    return native.deployed_layer(layer, x, product)

  replaced = read(floats) - read(codes)
  for path, layer in deployment.layers.items():
    if _is_product(layer.layer) and layer.stack and path not in replaced:
      raise ConfigError(
        f'parameter {path!r} is multiplied in a loop, and read otherwise too: such a '
        'network cannot be exported'
      )
  return frozenset(replaced)


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
