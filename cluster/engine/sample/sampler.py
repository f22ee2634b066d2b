"""From rows of logits to tokens, on rank 0.

The rule that everything here keeps: what is drawn for a row depends on that row alone, never on the others or on how
many there are. torch's vectorised exp and log differ in the last bit between the body of a tensor and its tail, so
they are never called here: only `parallel.vocabulary.logsumexp`'s, whose bits do not depend on the place, and
operations that are exact element by element.

A draw inverts the distribution function in the order of token ids: one uniform number per token (see
cluster.engine.rng) is looked up first among sums over leaves of 512 tokens, then inside one leaf.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cluster.engine.rng import uniform
from cluster.engine.sample.logits_processors import adjustments_of, adjusts
from cluster.engine.sample.top_k_top_p import LEAF, cut, leaf_sums, picked
from cluster.engine.sequences.fault_isolation import GROUP_FAULTS, each_alone
from cluster.engine.sequences.sequence import Sequence
from parallel.vocabulary.logsumexp import invariant_exp, row_best, row_max

COLDEST = 1e-30
"""Temperatures above 0 are taken as at least this: the division then cannot make a NaN."""


@dataclass(slots=True)
class Drawn:
    """One token per row; rows in `errors` have none worth reading."""

    tokens: list[int]
    errors: dict[int, str] = field(default_factory=dict)


class Sampler:
    """Draws the next token of each sequence from its row of logits."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def draw(self, logits_RV: Tensor, sequences: Many[Sequence]) -> Drawn:
        """logits_RV float32, one row per sequence; left unchanged. A row whose draw raises fails alone."""
        drawn: list[tuple[int, str | None]] = each_alone(
            lambda places: self._draw_some(logits_RV, sequences, places),
            range(len(sequences)),
            lambda why: (0, why),
        )
        return Drawn([token for token, _ in drawn], {i: why for i, (_, why) in enumerate(drawn) if why is not None})

    def _draw_some(
        self, logits_RV: Tensor, sequences: Many[Sequence], places: Many[int]
    ) -> list[tuple[int, str | None]]:
        some = logits_RV if len(places) == len(sequences) else logits_RV[list(places)]
        drawn = self._draw(some, [sequences[i] for i in places])
        return [(token, drawn.errors.get(i)) for i, token in enumerate(drawn.tokens)]

    def _draw(self, logits_RV: Tensor, sequences: Many[Sequence]) -> Drawn:
        errors = bad_rows(logits_RV.amax(1).tolist())
        rows_RV = self._adjusted(logits_RV, sequences, errors)
        tokens = [0] * len(sequences)
        greedy = [i for i, seq in enumerate(sequences) if seq.sampling.greedy]
        others = [i for i, seq in enumerate(sequences) if not seq.sampling.greedy]
        if greedy:
            values, ids = row_best(picked(rows_RV, greedy))
            self._note(tokens, errors, greedy, ids.tolist(), values.tolist())
        if others:
            chosen = [sequences[i] for i in others]
            best, drawn = draw_rows(picked(rows_RV, others), chosen)
            self._note(tokens, errors, others, drawn, best)
        return Drawn(tokens, errors)

    def _adjusted(self, logits_RV: Tensor, sequences: Many[Sequence], errors: dict[int, str]) -> Tensor:
        """The rows after what each request asks to be done to its own; a copy where anything is."""
        places = [i for i, seq in enumerate(sequences) if adjusts(seq)]
        if not places:
            return logits_RV
        rows_RV = logits_RV.clone()
        for i in places:
            seq = sequences[i]
            try:
                adjustments_of(seq, self.vocab_size, logits_RV.device).apply(rows_RV[i], seq)
            except GROUP_FAULTS:
                raise
            except Exception as error:  # noqa: BLE001 (this row's own)
                errors[i] = f"its sampling parameters could not be applied: {error}"
        return rows_RV

    def _note(
        self, tokens: list[int], errors: dict[int, str], places: list[int], ids: list[int], best: list[float]
    ) -> None:
        for i, token, value in zip(places, ids, best, strict=True):
            tokens[i] = token
            if value == float("-inf") and i not in errors:
                errors[i] = (
                    "no token is left that may be drawn: bad_words, allowed_token_ids, min_new_tokens and "
                    "structured_outputs exclude all"
                )


def bad_rows(largest: list[float]) -> dict[int, str]:
    """Rows whose largest logit is no finite number, with the reason: such a row ends its sequence, never silently."""
    wrong = {i: value for i, value in enumerate(largest) if not abs(value) < float("inf")}
    return {
        i: f"the model's logits hold {value}: its weights or activations overflowed or are damaged"
        for i, value in wrong.items()
    }


def draw_rows(rows_RV: Tensor, sequences: Many[Sequence]) -> tuple[list[float], list[int]]:
    """The largest logit of each row before scaling, and the token drawn for it."""
    device = rows_RV.device
    best = row_max(rows_RV.contiguous())
    damaged = ~best.isfinite()
    if damaged.any():  # the caller reports them; here they must not disturb the others
        rows_RV, best = rows_RV.masked_fill(damaged[:, None], 0.0), best.masked_fill(damaged, 0.0)
    temperatures = [max(seq.sampling.temperature, COLDEST) for seq in sequences]
    scaled = (rows_RV - best[:, None]).div_(torch.tensor(temperatures, dtype=torch.float32, device=device)[:, None])
    cut(scaled, [seq.sampling for seq in sequences])
    draws = [uniform(seq.stream, seq.position) for seq in sequences]
    ids = look_up(scaled, torch.tensor(draws, dtype=torch.float64, device=device))
    return best.masked_fill_(damaged, float("-inf")).tolist(), ids.tolist()


def look_up(scaled_RV: Tensor, uniforms_R: Tensor) -> Tensor:
    """[R] the first token at which the distribution function of exp(scaled) exceeds the uniform number."""
    vocab_size = scaled_RV.shape[1]
    leaf, share = _invert(leaf_sums(scaled_RV), uniforms_R)
    columns = leaf[:, None] * LEAF + torch.arange(LEAF, device=scaled_RV.device)
    inside = scaled_RV.gather(1, columns.clamp(max=vocab_size - 1)).masked_fill_(columns >= vocab_size, float("-inf"))
    token, _ = _invert(invariant_exp(inside).double(), share)
    return leaf * LEAF + token


def _invert(masses_RN: Tensor, uniforms_R: Tensor) -> tuple[Tensor, Tensor]:
    """Where the running sum first exceeds uniform x total, and how far into that part, in [0, 1)."""
    sums = masses_RN.cumsum(1)
    total = sums[:, -1:]
    wanted = torch.minimum(uniforms_R[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    place = torch.searchsorted(sums, wanted, right=True).clamp_(max=masses_RN.shape[1] - 1)
    mass = masses_RN.gather(1, place)
    share = (wanted - (sums.gather(1, place) - mass)) / mass
    return place[:, 0], share[:, 0].clamp(0.0, 1.0 - 2.0**-53)
