"""What a model is: the families, their configurations, checkpoints and tokenizers. Knows nothing of how models
are run.
"""

from tp_decoders.checkpoint.load_save import build, initialise, load, save

__all__ = ["build", "initialise", "load", "save"]
