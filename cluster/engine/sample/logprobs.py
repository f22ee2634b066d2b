"""Log-probabilities that go back with tokens: those of the model itself, before penalties, cuts and temperature; where
a grammar allows only some tokens, of these (token_masks.py).

They are the trainer's bit for bit: a logit minus the log-sum-exp that is taken leaf by leaf over the vocabulary's
virtual shards (parallel.vocabulary.vocab_parallel). `response.logprobs_temperature` other than 1 divides the logits
first.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from cluster.engine.request import TokenLogprobs
from cluster.engine.sequences.fault_isolation import each_alone
from cluster.engine.top_logprobs import NO_ALTERNATIVES, Alternatives
from parallel.vocabulary.top_tokens import row_top


class Normaliser(Protocol):
    """What a vocabulary head offers for gathered logits."""

    def full_log_normaliser(self, logits_TV: Tensor) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Asked:
    """One row's question: whose log-probability, how many alternatives, at which temperature."""

    row: int
    token: int
    top: int
    temperature: float


def token_logprobs(head: Normaliser, logits_RV: Tensor, asked: Many[Asked]) -> list[TokenLogprobs | str]:
    """One answer per question; the reason instead where the row is not finite, or its computation raises."""
    return each_alone(lambda some: _token_logprobs(head, logits_RV, some), asked, str)


def _token_logprobs(head: Normaliser, logits_RV: Tensor, asked: Many[Asked]) -> list[TokenLogprobs | str]:
    places = [question.row for question in asked]
    scaled = logits_RV if places == list(range(logits_RV.shape[0])) else logits_RV[places]
    scaled = at_temperatures(scaled, [question.temperature for question in asked])
    normaliser = head.full_log_normaliser(scaled)
    targets = torch.tensor([question.token for question in asked], dtype=torch.long, device=scaled.device)
    chosen = (scaled.gather(1, targets[:, None])[:, 0] - normaliser).tolist()
    most = max(question.top for question in asked)
    if not most:
        return [checked(question.token, value) for question, value in zip(asked, chosen, strict=True)]
    logits, ids = row_top(scaled, most)
    tops = _alternatives(ids, logits - normaliser[:, None], [question.top for question in asked])
    return [checked(question.token, value, top) for question, value, top in zip(asked, chosen, tops, strict=True)]


def _alternatives(ids_TK: Tensor, values_TK: Tensor, counts: Many[int]) -> list[Alternatives]:
    """The first `counts` of each row, without tokens that cannot happen."""
    equal = (values_TK[:, 1:] == values_TK[:, :-1]).any(1).nonzero()[:, 0].tolist()
    ids, values = ids_TK.to(torch.int32).cpu().numpy(), values_TK.float().cpu().numpy()
    for row in equal:  # by rounding: then the lower id goes first
        order = np.lexsort((ids[row], -values[row]))
        ids[row], values[row] = ids[row][order], values[row][order]
    possible = (values != -np.inf).sum(1).tolist()
    return [
        Alternatives(ids[row, :count].tobytes() + values[row, :count].tobytes())
        for row, count in enumerate(map(min, counts, possible))
    ]


def at_temperatures(logits_RV: Tensor, temperatures: Many[float] | None) -> Tensor:
    """Logits divided by each row's temperature; untouched where all are 1."""
    if temperatures is None or all(t == 1.0 for t in temperatures):
        return logits_RV
    return logits_RV / torch.tensor(temperatures, dtype=torch.float32, device=logits_RV.device)[:, None]


def checked(token: int, value: float, top: Alternatives = NO_ALTERNATIVES) -> TokenLogprobs | str:
    """NaN means that the row had no finite log-sum-exp."""
    if value != value:
        return (
            f"the model's logits give token {token} the log-probability {value}: its weights or activations are damaged"
        )
    return TokenLogprobs(token, value, top)
