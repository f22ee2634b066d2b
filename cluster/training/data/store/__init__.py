"""A corpus as memory-mapped tokens: written once, interruptible, with the tokenizer's fingerprint.
Order and packing are batches/'.
"""
