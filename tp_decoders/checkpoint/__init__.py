"""Checkpoints of transformers: loaded by slices, matched with parameters, written by one rank or by all.
Foreign formats are convert/'s, adapters adapters/'; a run's optimiser state is cluster/training/checkpoint's.
"""
