"""Beam search and best-of as arithmetic on log-probabilities: which hypotheses go on, which are the best.
Knows no tensor and no block: rows of candidates are sample/'s, tables kv_cache/'s.
"""
