"""The vocabulary divided over ranks: embedding and head, log-sum-exp, cross-entropy, the likeliest tokens.
Drawing a token is cluster/engine/sample's, a training loss cluster/training/step's.
"""
