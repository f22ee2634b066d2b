"""How a tensor is divided: sharding rules as values, the fixed reduction tree, parameters that know of their writes.
Talks to no other rank (ranks/) and computes no layer (layers/).
"""
