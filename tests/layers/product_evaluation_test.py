"""Which operations a product may be in, to be computed in another way."""

from fliqs_jax.layers import parameter_products, product_evaluation


def test_what_counts_as_open_is_rebuilt():
  assert parameter_products.REBUILT == set(product_evaluation.REBUILDERS)
