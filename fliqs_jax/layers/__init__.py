"""Layers as a search knows them, whichever interface of Flax they have.

layer         shapes, arguments and counts of one layer; formats and sizes bound to it
products      the products that Flax's layers compute, from the arguments of lax
architecture  sizes that are functions of decisions
variants      the layers that those of a supernet can become
call_counts   how often a layer computes, counted in a traced network
"""

from fliqs_jax.layers.layer import BoundLayer, Layer

__all__ = ['BoundLayer', 'Layer']
