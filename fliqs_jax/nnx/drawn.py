"""A network of NNX whose weights are drawn by `init`, as those of a linen module."""

from collections.abc import Callable, Mapping
from typing import Any

from flax import nnx

from fliqs_jax.nnx.searchable import Searchable


class Drawn(Searchable):
  """As `Searchable`, of a network that is known by its shapes until `init` draws it.

  So a network that no single device can hold is built, and drawn where it is to lie.
  """

  def __init__(
    self,
    make: Callable[[nnx.Rngs], nnx.Module],
    attributes: Mapping[str, Any],
    attention_products: bool = False,
  ):
    """Traces a network, which computes nothing.

    Args:
      make: makes the network.
      attributes: of `QuantizedOperator`.
      attention_products: whether the products inside attention are searched too.
    """
    shapes = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
    super().__init__(shapes, attributes, attention_products)
    self._make = make

  def init(self, key: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """As `nn.Module.init`, whose key is consumed."""
    return self.variables_of(self._make(nnx.Rngs(key)), *args, **kwargs)

  def own_variables(self, *args: Any, **kwargs: Any) -> None:
    """Returns None, since there are none before `init`."""
    del args, kwargs
