"""The adapter to Flax NNX: it finds layers, names them and keeps their state.

operators      quantized operators for the hooks of NNX's layers
hooks          which operators a network's layers get, and why some get none
bare_products  products of its parameters that go through no layer
searchable     a user's own network with its layers searched
drawn          a network that is known by its shapes until its weights are drawn
"""

from fliqs_jax.nnx.searchable import Searchable

__all__ = ['Searchable']
