"""Sharded layers: column- and row-parallel linear, their low-rank branches, norms, dropout; the gradient's norm.
Vocabulary and attention have rooms of their own; a family's blocks are tp_decoders/families'.
"""
