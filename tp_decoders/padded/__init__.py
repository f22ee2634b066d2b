"""The padded [batch, time] call of transformers' models around the flat forward, with its inputs, masks and caches.
Serving and training do not use it: they hand over flat tokens.
"""

from tp_decoders.padded.padded_model import PaddedModel
from tp_decoders.padded.padded_tasks import PaddedTask

__all__ = ["PaddedModel", "PaddedTask"]
