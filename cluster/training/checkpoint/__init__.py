"""Training checkpoints: written by all ranks beside the work, restored, and the folder in which a server keeps them.
The Hugging Face files themselves are tp_decoders/checkpoint's.
"""
