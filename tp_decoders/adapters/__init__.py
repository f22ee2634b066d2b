"""Low-rank adapters: attached to a model's layers, merged and taken out, read and written as PEFT does.
The branch's arithmetic is parallel/layers/low_rank.
"""
