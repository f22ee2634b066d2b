"""The key/value cache as integers: a pool of blocks, which sequence holds which slot and blocks, tables of beams.
The tensors are parallel/attention/kv_cache's; who gets blocks is schedule/'s choice.
"""
