"""The network of a finished search as files that other programs run.

parameters        codes and scales of each layer
weights           what layers multiply by where it is not their kernel
codes             codes as bits, packed
deployment        the network with its weights, and examples to compare outputs on
native            what a layer computes from codes
safetensors_file  weights in one safetensors file
stablehlo         the network as a program that jax alone runs
onnx_file         the network as an ONNX file
onnx_graph        the graph of such a file from a traced network
folding           batch normalisation folded into the layers before it
qwix_files        rules and quantized parameters for Qwix
verification      the comparison with the searched network
exporter          a folder that is there whole and verified, or not at all
loading           loaders run in processes of their own
speed             times of exported networks beside each other
loaders           these programs, which need nothing of this package
"""
