"""The memory that training takes beside serving, on one rank: what must stay free of the key/value cache.

    state        masters and gradients in float32, two moments; a float32 parameter is its own master
    a save       copies of weights, masters and moments while they are written; a load holds as much
    a pass       activations of one micro-batch and the rows of logits with their gradients: estimated, rather high

The last is a formula over the model's sizes: 5 to 30 % above what passes took on a CPU, not measured on a GPU.
"""

from __future__ import annotations

import torch

from parallel.options import Recompute
from tp_decoders.decoder import Decoder

MASTER, GRADIENT, MOMENTS = 4, 4, 8
LOGIT_COPIES = 5
"""The rows of logits, in float32, their exponentials, the gradients of both, and a temporary."""


def training_room(model: Decoder, micro_batch_tokens: int, recompute: Recompute, saves: bool) -> int:
    """Bytes. `saves`: states may be saved and loaded."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    state = sum(p.numel() * state_bytes(p.dtype) for p in parameters)
    copies = sum(p.numel() * (p.dtype.itemsize + state_bytes(p.dtype) - GRADIENT) for p in parameters) if saves else 0
    largest = max((p.numel() * p.dtype.itemsize for p in parameters), default=0)  # a gradient on its way to its sum
    return state + copies + largest + pass_bytes(model, micro_batch_tokens, recompute)


def state_bytes(dtype: torch.dtype) -> int:
    """Per element of a parameter, beside the parameter itself."""
    return GRADIENT + MOMENTS + (0 if dtype is torch.float32 else MASTER)


def pass_bytes(model: Decoder, tokens: int, recompute: Recompute) -> int:
    """Of a forward and backward over so many tokens: what blocks keep, one block's own work, and the logits."""
    config, size = model.config, model.group.size
    width = max(4, next(model.parameters()).dtype.itemsize)  # kernels compute, and keep sums, in float32
    whole, shared = 6 * config.d_model, (4 * config.d_model + 4 * config.d_ff) // size
    block = tokens * (whole + shared) * width
    spared = {"none": 0.0, "selective": 0.4, "full": 1.0}[recompute]
    kept = round(config.n_layers * (block * (1 - spared) + tokens * config.d_model * width * spared))
    vocabulary = -(-config.vocab_size // size) if model.has_vocabulary else 0
    return kept + 2 * block + LOGIT_COPIES * tokens * vocabulary * 4
