"""From texts to batches: corpus/ opens files, store/ tokenizes them once, batches/ shuffles, packs and deals.
Knows no model.
"""
