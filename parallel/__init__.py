"""Tensors and ranks: the layers, collectives and kernels that tensor parallelism is made of.

Knows no model, file or request, and imports nothing above torch. Groups are arguments, never globals.
"""
