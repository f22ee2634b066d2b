"""What the families have in common: config, decoder, positions, cross-attention, heads of tasks, pruning, resizing.
Nothing here reads a file (files/, checkpoint/) or knows one family (families/).
"""
