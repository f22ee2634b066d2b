"""A training job: steps over packed batches, its folder and records, the plot, samples, batches left out.
The rank that runs it is cluster/actors/programs/train_rank.
"""
