"""What a model is: the families, their configurations, checkpoints and tokenizers. Knows nothing of how models
are run. What needs torch is imported when it is asked for, so that plain values (`model.task_config`) cost nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tp_decoders.checkpoint.load_save import build, initialise, load, save

__all__ = ["build", "initialise", "load", "save"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("tp_decoders.checkpoint.load_save"), name)
