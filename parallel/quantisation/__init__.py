"""Weights in whole numbers: what they are (numbers), how they are made (schemes), and packed for products
(quantised_weight). Which weights of a model are, and from which files, is tp_decoders' affair.
"""
