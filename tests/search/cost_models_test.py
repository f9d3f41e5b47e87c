"""Cost models: published costs, hand computation, and what every model must do."""

from conftest import ROOT
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fliqs_jax import models
from fliqs_jax.layers.layer import Layer
from fliqs_jax.linen import discovery
from fliqs_jax.numerics import formats
from fliqs_jax.runs import setup as setup_lib
from fliqs_jax.runs.config import resolve
from fliqs_jax.search import cost_models, devices
from fliqs_jax.search import space as search_space
from fliqs_jax.search.cost_models import COST_MODELS, get_cost_model

WITHOUT_FILES = tuple(name for name in COST_MODELS if name != 'latency_table')
NO_CHOICES = np.zeros(0, np.int32)
SEARCHED = ('int2', 'int4', 'e2m1', 'e4m3', 'int8', 'bf16', 'float32')


def _resnet18_layers(**options):
  model = models.create_model('resnet18', 1000, **options)
  image = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
  return discovery.discover(model, image, train=False)


@pytest.fixture(scope='module')
def resnet18():
  return _resnet18_layers()


def _layer(name, macs, kernel_shape, kind='dense'):
  return Layer(
    name,
    f'{kind}_0',
    kind,
    (1, 1),
    kernel_shape,
    (1, 1),
    macs,
    int(np.prod(kernel_shape)),
  )


TOY = (
  _layer('a', 1000, (10, 10)),
  _layer('b', 27_000, (3, 3, 4, 8), 'conv'),
  _layer('c', 64, (8, 8)),
)


@pytest.mark.parametrize(
  ('width', 'digits', 'published'), [(0.5, 2, 31.13), (1.0, 1, 116.9), (2.0, 1, 452.5)]
)
def test_published_costs_of_resnet18(width, digits, published):
  # As FLIQS prints them: GBOPs in E4M3, so 64 · MACs.
  layers = _resnet18_layers(width=width, project_first_block=True)
  bops = get_cost_model('bops')
  cost = bops.uniform(layers, 'e4m3')
  assert round(cost, digits) == published
  assert bops.uniform(layers, 'e2m1') == pytest.approx(cost / 4, rel=1e-12)
  assert bops.uniform(layers, 'bf16') == pytest.approx(cost * 4, rel=1e-12)
  assert cost == pytest.approx(64e-9 * sum(layer.macs for layer in layers), rel=1e-12)


def test_bops_by_hand():
  space = search_space.fixed_space(
    TOY,
    {
      'a': {'weights': 'int4', 'activations': 'int8'},
      'b': {'weights': 'e2m1', 'activations': 'bf16'},
      'c': {'weights': 'float32', 'activations': 'int2'},
    },
  )
  bops = get_cost_model('bops')
  # A layer that is not quantized counts 16 bits.
  expected = np.array([1000 * 4 * 8, 27_000 * 4 * 16, 64 * 16 * 2]) / 1e9
  np.testing.assert_allclose(bops.per_layer(space, NO_CHOICES), expected, rtol=1e-12)
  assert bops(space, NO_CHOICES) == pytest.approx(expected.sum(), rel=1e-12)
  assert bops.unit == 'GBOPs'


def test_model_size_by_hand():
  space = search_space.fixed_space(
    TOY,
    {
      'a': {'weights': 'int4', 'activations': 'int8'},
      'b': {'weights': 'e2m5', 'activations': 'int2'},
      'c': {'weights': 'float32', 'activations': 'int2'},
    },
  )
  size = get_cost_model('model_size')
  expected = [100 * 4 / 8, 3 * 3 * 4 * 8 * 8 / 8, 64 * 16 / 8]
  np.testing.assert_allclose(size.per_layer(space, NO_CHOICES), expected, rtol=1e-12)
  assert size.unit == 'bytes'


def test_model_size_of_resnet18_in_int8_is_its_kernels(resnet18):
  # All parameters but those of batch norm (two for each of 4,800 channels) and the
  # classifier's biases.
  kernels = 11_689_512 - 2 * 4800 - 1000
  assert get_cost_model('model_size').uniform(resnet18, 'int8') == kernels
  assert get_cost_model('model_size').uniform(resnet18, 'int4') == kernels / 2


def test_float32_counts_as_bfloat16():
  for model in map(get_cost_model, WITHOUT_FILES):
    assert model.uniform(TOY, 'float32') == model.uniform(TOY, 'bf16')


def test_an_unknown_model_names_the_nearest():
  with pytest.raises(ValueError, match="'bop'.*nearest is 'bops'"):
    get_cost_model('bop')


def test_a_registered_model_is_found(monkeypatch):
  monkeypatch.setattr(cost_models, 'COST_MODELS', dict(COST_MODELS))

  @cost_models.register('mean_compute', unit='Gbit·MACs')
  def mean_compute(layers):
    return layers.macs * (layers.weight_bits + layers.activation_bits) / 2e9

  model = get_cost_model('mean_compute')
  assert (model.name, model.unit) == ('mean_compute', 'Gbit·MACs')
  assert model.uniform(TOY, 'int4') == pytest.approx(28_064 * 4 / 1e9, rel=1e-12)
  assert mean_compute is model.layer_costs


def test_the_model_of_the_documentation_can_be_searched_for(monkeypatch):
  monkeypatch.setattr(cost_models, 'COST_MODELS', dict(COST_MODELS))
  monkeypatch.syspath_prepend(ROOT)  # for the config that it changes
  text, module = (ROOT / 'docs/costs.md').read_text(), {}
  exec(text.split('```python\n')[1].split('```')[0], module)
  config = module['get_config']('digits')
  for field in ('cost_model', 'cap_cost_model'):
    config.search[field] = 'traffic'
  setup = setup_lib.build(resolve(config), num_devices=1)
  assert setup.cost_model.name == setup.caps[0].cost_model.name == 'traffic'
  weights, inputs = 100 + 288 + 64, 3
  assert setup.cost_model.uniform(TOY, 'int4') == (weights + inputs) / 2


def test_a_model_takes_the_settings_that_it_names(monkeypatch):
  monkeypatch.setattr(cost_models, 'COST_MODELS', dict(COST_MODELS))

  @cost_models.register('scaled', unit='units')
  def scaled(layers, device, scale=2.0):
    assert device == 'somewhere'
    return scale * layers.macs

  model = get_cost_model('scaled', device='somewhere', table=None)
  assert model.uniform(TOY, 'int4') == 2 * 28_064
  assert get_cost_model('bops', device='somewhere') is COST_MODELS['bops']


@pytest.mark.parametrize('named, given', [(None, 'tpu_v5e'), ('h100', 'h100')])
def test_a_registered_model_has_a_device_whether_one_is_named(
  named, given, monkeypatch, tiny_config
):
  monkeypatch.setattr(cost_models, 'COST_MODELS', dict(COST_MODELS))
  found = []

  @cost_models.register('on_a_device', unit='units')
  def on_a_device(layers, device):
    found.append(device)
    return layers.macs

  config = tiny_config.copy_and_resolve_references()
  config.search.update(cost_model='on_a_device', device=named)
  setup_lib.build(resolve(config), num_devices=1)
  assert set(found) == {given}


# A convolution of 4 to 8 channels on 5 × 5 positions, and a classifier of 4 classes.
SIZED = (
  Layer(
    'conv', 'op', 'conv', (1, 5, 5, 4), (3, 3, 4, 8), (1, 5, 5, 8), 7200, 288
  ),
  Layer('dense', 'op', 'dense', (1, 200), (200, 4), (1, 4), 800, 804),
)
SIZED_FORMATS = {
  'conv': {'weights': 'int4', 'activations': 'int8'},
  'dense': {'weights': 'e4m3', 'activations': 'e2m1'},
}


def _sized(name, **settings):
  model = get_cost_model(name, **settings)
  space = search_space.fixed_space(SIZED, SIZED_FORMATS)
  return model.unit, model.per_layer(space, NO_CHOICES), model(space, NO_CHOICES)


def test_linear_compute_by_hand():
  unit, layers, total = _sized('linear_compute')
  assert unit == 'Gbit·MACs'
  np.testing.assert_allclose(layers, [7200 * 8e-9, 800 * 8e-9], rtol=1e-12)
  assert total == pytest.approx(8000 * 8e-9, rel=1e-12)


def test_activation_bytes_by_hand():
  unit, layers, total = _sized('activation_bytes')
  assert unit == 'bytes'
  np.testing.assert_allclose(layers, [100, 100], rtol=1e-12)  # 5·5·4·8 and 200·4 bits
  assert total == 200


def test_peak_activation_bytes_by_hand():
  unit, layers, peak = _sized('peak_activation_bytes')
  assert unit == 'bytes'
  # The outputs, 5·5·8 and 4 elements, are as wide as the inputs.
  np.testing.assert_allclose(layers, [100 + 200, 100 + 2], rtol=1e-12)
  assert peak == 300


def test_roofline_by_hand():
  # H200: int4 in int8 at 1979 TOPS; e4m3 with e2m1 in fp8, each stored in 8 bits.
  unit, layers, total = _sized('roofline', device='h200')
  assert unit == 'ms'
  conv, dense = (288 + 100 + 200) / 4.8e9, (800 + 200 + 4) / 4.8e9
  np.testing.assert_allclose(layers, [conv, dense], rtol=1e-12)  # bound by memory
  assert total == pytest.approx(conv + dense, rel=1e-12)
  # TPU v5e: int4 is stored in 4 bits and multiplied with int8; no fp8, so bf16.
  _, layers, _ = _sized('roofline', device='tpu_v5e')
  conv, dense = (144 + 100 + 200) / 819e6, 2 * (800 + 200 + 4) / 819e6
  np.testing.assert_allclose(layers, [conv, dense], rtol=1e-12)


def test_roofline_bound_by_compute():
  # A convolution of 256 to 256 channels on 56² positions.
  macs = 56**2 * 9 * 256**2
  shape = (1, 56, 56, 256)
  layer = Layer('conv', 'op', 'conv', shape, (3, 3, 256, 256), shape, macs, 0)
  for device, name, peak in (
    ('a100', 'int8', 624e12),
    ('a100', 'e4m3', 312e12),
    ('tpu_v5e', 'bf16', 197e12),
  ):
    model = get_cost_model('roofline', device=device)
    assert model.uniform((layer,), name) == pytest.approx(2e3 * macs / peak, rel=1e-12)


@pytest.mark.parametrize('device', devices.DEVICES)
def test_roofline_never_falls_with_the_bits_of_a_family(device, resnet18):
  model = get_cost_model('roofline', device=device)
  for family in (('int2', 'int4', 'int6', 'int8', 'bf16'), ('e2m1', 'e4m3', 'bf16')):
    for other in SEARCHED:
      costs = []
      for name in family:
        operands = (
          {'weights': name, 'activations': other},
          dict.fromkeys(search_space.OPERANDS, name),
        )
        spaces = (
          search_space.fixed_space(resnet18, {layer.path: o for layer in resnet18})
          for o in operands
        )
        costs.append([model.per_layer(space, NO_CHOICES) for space in spaces])
      assert (np.diff(costs, axis=0) >= 0).all()


@pytest.mark.parametrize('name', WITHOUT_FILES)
class TestEveryCostModel:
  def test_costs_are_not_negative(self, name, resnet18):
    model = get_cost_model(name)
    for format_name in formats.NAMES:
      space = search_space.uniform_space(resnet18, format_name)
      assert (model.per_layer(space, NO_CHOICES) >= 0).all()
      # A network without products inside attention keeps no keys and values.
      assert (model(space, NO_CHOICES) > 0) == (name != 'kv_cache')

  @pytest.mark.parametrize('operands', search_space.SEARCHED_OPERANDS)
  def test_more_bits_in_one_decision_never_cost_less(self, name, operands, resnet18):
    model = get_cost_model(name)
    space = search_space.build_space(resnet18, SEARCHED, operands)
    bits = np.minimum(formats.stack(SEARCHED).bits, 16)
    # On a device an integer may be faster than a float of fewer bits.
    integer = np.array([option.startswith('int') for option in SEARCHED])
    comparable = (integer[:, None] == integer) | (bits == 16)
    if name != 'roofline':
      comparable[:] = True
    rng = np.random.default_rng(0)
    for _ in range(20):
      choices = rng.integers(len(SEARCHED), size=len(space.decisions)).astype(np.int32)
      decision = rng.integers(len(choices))
      costs = []
      for option in range(len(SEARCHED)):
        choices[decision] = option
        costs.append(model(space, choices))
      for a in range(len(SEARCHED)):
        for b in range(len(SEARCHED)):
          if bits[a] <= bits[b] and comparable[a, b]:
            assert costs[a] <= costs[b]

  def test_costs_combine_over_layers(self, name, resnet18):
    model = get_cost_model(name)
    rng = np.random.default_rng(1)
    assignment = {
      layer.path: dict(
        zip(search_space.OPERANDS, rng.choice(SEARCHED, 2).tolist(), strict=True)
      )
      for layer in resnet18
    }
    space = search_space.fixed_space(resnet18, assignment)
    alone = [
      model(
        search_space.fixed_space([layer], {layer.path: assignment[layer.path]}),
        NO_CHOICES,
      )
      for layer in resnet18
    ]
    np.testing.assert_allclose(model.per_layer(space, NO_CHOICES), alone, rtol=1e-12)
    combined = {'sum': sum, 'max': max}[model.combine](alone)
    assert model(space, NO_CHOICES) == pytest.approx(combined, rel=1e-12)

  @pytest.mark.parametrize('operands', search_space.SEARCHED_OPERANDS)
  def test_numpy_in_float64_and_traced_in_float32_agree(self, name, operands, resnet18):
    model = get_cost_model(name)
    space = search_space.build_space(resnet18, SEARCHED, operands)
    shape = (50, len(space.decisions))
    choices = np.random.default_rng(2).integers(
      len(SEARCHED), size=shape, dtype=np.int32
    )
    exact = model(space, choices)
    assert exact.dtype == np.float64 and exact.shape == (50,)
    traced = jax.jit(lambda c: model(space, c))(choices)
    assert traced.dtype == np.float32
    np.testing.assert_allclose(traced, exact, rtol=1e-6)
    for row in range(5):
      assert model(space, choices[row]) == pytest.approx(exact[row], rel=1e-12)

  def test_choices_cost_what_their_formats_cost(self, name, resnet18):
    model = get_cost_model(name)
    space = search_space.build_space(resnet18, SEARCHED, 'separate')
    rng = np.random.default_rng(3)
    for _ in range(20):
      choices = rng.integers(len(SEARCHED), size=len(space.decisions), dtype=np.int32)
      fixed = search_space.fixed_space(resnet18, space.formats_of(choices))
      assert model(space, choices) == pytest.approx(model(fixed, NO_CHOICES), rel=1e-12)

  def test_uniform_is_the_cost_of_a_uniform_space(self, name, resnet18):
    model = get_cost_model(name)
    space = search_space.build_space(resnet18, SEARCHED)
    for option, format_name in enumerate(SEARCHED):
      choices = np.full(len(space.decisions), option, np.int32)
      assert model.uniform(resnet18, format_name) == pytest.approx(
        float(model(space, choices)), rel=1e-12
      )
