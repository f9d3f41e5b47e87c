"""An ONNX graph from a traced network, for a batch whose size is not known.

conversion   equations of a jaxpr as nodes
graph        nodes and constants, and what they are made with
elementwise  rules of what is computed of each element
shapes       rules of what changes shapes and order
indexing     rules of gathering and scattering
reductions   rules of sums, maxima, sorting, and pooling
products     rules of products and convolutions
"""
