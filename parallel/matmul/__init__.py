"""Matrix products of sharded layers: which kernel, in which order, activations after them, gradients of input and
weight. The kernels themselves are in native/, the layers that hold weights in layers/.
"""
