"""Tasks besides language modelling: their settings in config.json, their outputs and the reference's losses.
The heads' layers are in model/; training on labels is cluster/training/step's.
"""
