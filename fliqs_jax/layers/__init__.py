"""Layers as a search knows them, whichever interface of Flax they have.

layer         shapes, arguments and counts of one layer; formats and sizes bound to it
products      the products that Flax's layers compute, from the arguments of lax
origins       parameters that values of a traced network follow from
parameter_products  products in a traced network, of parameters and of activations
product_evaluation  products of parameters computed in another way
product_statistics  moving averages of the inputs of these products
attention     products inside attention, found and replaced
replacement   layers that compute by another function, or show their inputs
moments       second moments of layers' inputs, kernels as matrices
channels      how large their inputs are; kernels with channels scaled
architecture  sizes that are functions of decisions
variants      the layers that those of a supernet can become
call_counts   how often a layer computes, counted in a traced network
variables     names of variable collections, and formats put into one
coverage      which layers of a network are searched, and why others are not
array_leaves  arrays among the leaves of any tree
"""

from fliqs_jax.layers.coverage import Coverage
from fliqs_jax.layers.layer import BoundLayer, Layer
from fliqs_jax.layers.variables import nest

__all__ = ['BoundLayer', 'Coverage', 'Layer', 'nest']
