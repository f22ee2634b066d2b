"""An attention_mask of four axes, [B, 1 or N, T, past + T]: what every column sees, in place of causality.

As transformers has it: bool, true where a column is seen, or floating point, added to the scores. (Its eager attention
adds a bool one, too, which means nothing, and GPT-2's is causal besides; here as its sdpa has it.) With such a mask all
columns hold tokens; nothing is padding. B batch, N heads, T new columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from parallel.errors import RequestError
from tp_decoders.model.decoder import Decoder


def of_four_axes(mask: Tensor | None) -> bool:
    return mask is not None and mask.dim() == 4


def checked_matrix(model: Decoder, mask: Tensor, batch: int, time: int, past: int) -> Tensor:
    """What is added to the scores, float32; -inf where a column is hidden."""
    by_distance = not model.config.takes_positions  # the reference reads numbers as 0 and 1, and no mask by head
    heads = 1 if mask.shape[1] == 1 or by_distance else model.config.n_heads
    shape = (batch, heads, time, past + time)
    if tuple(mask.shape) != shape:
        raise RequestError(
            f"attention_mask of shape {list(mask.shape)}; with four axes it is {list(shape)} here: [batch, 1 or heads, "
            "new columns, past and new columns], and 1 for models with ALiBi"
        )
    if mask.dtype is torch.bool:
        added = torch.zeros(shape, device=mask.device).masked_fill(~mask, float("-inf"))
    elif mask.is_floating_point() and not by_distance:
        added = mask.to(torch.float32)
    else:
        raise RequestError(
            f"attention_mask of four axes and type {mask.dtype}; give bool (true: seen), or, for models without ALiBi, "
            "floating point, which is added to the scores"
        )
    if bool((added == float("-inf")).all(-1).any()):
        raise RequestError("attention_mask hides every column from one of them; leave it at least one")
    return added
