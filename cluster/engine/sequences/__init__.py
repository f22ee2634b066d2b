"""What runs and what waits: samples, their callers' flows and queues, and whose fault an exception is.
Records that others change: who goes first is schedule/'s, who holds blocks kv_cache/'s.
"""
