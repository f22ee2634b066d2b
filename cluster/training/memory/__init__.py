"""What training or serving a model takes, before anything is allocated: bytes by kind for every rank, and collectives.

    static.py     what lasts: weights, gradients, optimiser state, packed copies, cache; from shards on the meta device
    passes.py     what a forward and backward holds at its worst: the model's own code run on the meta device, counted
    estimate.py   both together, as one rank's memory
    layouts.py    which tp x dp x recomputation x sequence parallelism fit, in what order, and why

No shape of a family is written down here, and nothing asks a machine what it has.
"""
