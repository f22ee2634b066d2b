"""Attention over local heads: the pass a model is handed, the backends and their choice, the paged cache's tensors.
Which block belongs to whom is cluster/engine/kv_cache's; the C++ kernel is in native/.
"""
