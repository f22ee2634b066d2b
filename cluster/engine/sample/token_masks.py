"""What a grammar does not allow, taken out of rows of logits: on every rank, of its own part of the vocabulary.

Before anything else is made of the logits, so the largest one, draws, cuts and log-probabilities are all of the tokens
that are allowed: log-probabilities are those of the model given its grammar, as in vLLM.
"""

from __future__ import annotations

from collections.abc import Sequence as Many

import numpy as np
import torch
from torch import Tensor

NEVER = float("-inf")


def forbid(logits_RV: Tensor, masks: Many[tuple[int, bytes]], start: int) -> None:
    """Changes rows in place. `masks`: (row, a bit for every token of the whole vocabulary, in words of 32 bits, the
    lowest first); the rows hold the logits of tokens `start` and on.
    """
    if not masks or not logits_RV.shape[1]:
        return
    words = np.stack([np.frombuffer(mask, np.uint8) for _, mask in masks])
    first, last = start // 8, -(-(start + logits_RV.shape[1]) // 8)
    bits = np.unpackbits(words[:, first:last], axis=1, bitorder="little")
    skipped = start - 8 * first
    no = torch.from_numpy(bits[:, skipped : skipped + logits_RV.shape[1]] == 0).to(logits_RV.device)
    for row, (place, _) in enumerate(masks):
        logits_RV[place].masked_fill_(no[row], NEVER)
