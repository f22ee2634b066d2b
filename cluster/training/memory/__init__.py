"""What training or serving a model takes, before anything is allocated: bytes by kind for every rank, and collectives.

    lasting_memory.py   what lasts: weights, gradients, optimiser state, packed copies, cache; shards on the meta device
    pass_memory.py      what a forward and backward holds at its worst: the model's own code run on the meta device
    estimate.py         both together, as one rank's memory
    layouts.py          which tp x dp x recomputation x sequence parallelism fit, in what order, and why
    memory_reserve.py   what must stay free of the cache where a server trains

No shape of a family is written down here, and nothing asks a machine what it has.
"""
