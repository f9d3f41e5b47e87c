"""The adapter to Flax linen: it finds layers, names them and keeps their state.

operators     quantized operators for the hooks of linen's layers
interception  a user's own network with its layers searched
bare_products products of its parameters that go through no layer
attention     products inside attention
discovery     the layers of a network, found by tracing it
supernet      parts of networks whose architecture is searched
"""

from fliqs_jax.linen.discovery import discover
from fliqs_jax.linen.interception import Searchable, make_searchable
from fliqs_jax.linen.operators import conv_hooks, dense_hooks
from fliqs_jax.linen.supernet import gated, tell_sizes

__all__ = [
  'Searchable',
  'conv_hooks',
  'dense_hooks',
  'discover',
  'gated',
  'make_searchable',
  'tell_sizes',
]
