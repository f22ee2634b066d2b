"""From stored tokens to batches: split, pieces, shuffle, packing, the loader and its state; labelled texts.
Reads no corpus file but the labelled ones.
"""
