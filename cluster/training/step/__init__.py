"""One training step: losses, forward and backward, gradients, the optimiser, guards against numbers not finite, FLOPs.
Data, checkpoints and whoever asks for a step are other rooms'.
"""
