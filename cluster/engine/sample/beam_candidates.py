"""What rank 0 knows of the token after a beam: its candidates, best first, as the beam search asks for them.

A search looks at the best `width` candidates of all, some of which may stop, and at the best `width` that do not. So
a row answers with its own best of either kind, and costs the same however many tokens stop.

Two kinds. A plain beam needs only the likeliest tokens, which the ranks find in their own parts of the vocabulary
(parallel.vocabulary.top_tokens). Where the request changes logits (penalties, bans) the whole row is gathered and
adjusted here. Both give the same bits, and the log-probabilities are those of the model before anything is changed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from cluster.engine.beams.beam_search import Candidate, Row
from cluster.engine.request import TokenLogprobs
from cluster.engine.sample.logits_processors import NEVER, adjustments_of
from cluster.engine.sequences.sequence import Sequence
from cluster.engine.top_logprobs import Alternatives, Pair
from parallel.vocabulary.top_tokens import row_top

MOST_RANKED_STOPS = 128
"""With more stop tokens than that a row is gathered: what a step costs must not grow with them."""


def needs_whole_rows(seq: Sequence) -> bool:
    """Whether more is asked for than the likeliest tokens, less a few stop tokens where those may not come yet."""
    given = seq.sampling
    banned = given.bad_words or given.allowed_token_ids is not None or given.no_repeat_ngram_size
    penalties = (given.repetition_penalty - 1.0, given.presence_penalty, given.frequency_penalty)
    changed = given.logit_bias or banned or any(penalties) or given.guide is not None
    return bool(changed or len(seq.stop_ids) > MOST_RANKED_STOPS)


def num_ranked(seq: Sequence) -> int:
    """How many of the likeliest tokens decide a step: those that stop, or that other groups took, come on top."""
    beam = seq.sampling.beam
    assert beam is not None, "only beams are ranked"
    others = beam.width if beam.groups > 1 else 0
    return max(beam.width // beam.groups + len(seq.stop_ids) + others, seq.top_logprobs or 0)


class RankedRow:
    """A row of which the likeliest tokens are known."""

    def __init__(self, seq: Sequence, pairs: list[Pair]) -> None:
        self._seq, self._pairs = seq, pairs

    def best(self, count: int, penalties: Mapping[int, float]) -> list[Candidate]:
        seq, pairs = self._seq, self._pairs
        banned = seq.stop_ids if seq.position < seq.min_tokens else frozenset()
        kept = [(token, value - penalties.get(token, 0.0), value) for token, value in pairs if token not in banned]
        if penalties:
            kept.sort(key=lambda item: (-item[1], item[0]))
        return list(enough(_candidates(seq, kept, pairs), count, seq.stop_ids))


class WholeRow:
    """A row of log-probabilities over the whole vocabulary, of which the request changes some."""

    def __init__(self, seq: Sequence, log_probs_V: Tensor) -> None:
        self._seq, self._log_probs = seq, log_probs_V

    @torch.inference_mode()
    def best(self, count: int, penalties: Mapping[int, float]) -> list[Candidate]:
        seq, given = self._seq, self._log_probs
        adjustments, row_V = adjustments_of(seq, len(given), given.device), given.clone()
        adjustments.apply(row_V, seq, penalties)
        kept = self._best(row_V, count)
        if seq.stop_ids and seq.position >= seq.min_tokens:
            others = self._best(row_V, count, adjustments.fixed.others)
            kept = sorted({*kept, *others}, key=lambda item: (-item[1], item[0]))
        return list(enough(_candidates(seq, kept, self._top(seq.top_logprobs or 0)), count, seq.stop_ids))

    def _best(self, row_V: Tensor, count: int, among: Tensor | None = None) -> list[tuple[int, float, float]]:
        """The likeliest tokens that can happen: (token, value, the model's log-probability)."""
        values, places = row_top((row_V if among is None else row_V[among])[None], count)
        ids = places[0] if among is None else among[places[0]]
        found = zip(ids.tolist(), values[0].tolist(), self._log_probs[ids].tolist(), strict=True)
        return [item for item in found if item[1] != NEVER]

    def _top(self, count: int) -> list[Pair]:
        values, ids = row_top(self._log_probs[None], count)
        return list(zip(ids[0].tolist(), values[0].tolist(), strict=True))


def _candidates(seq: Sequence, kept: Iterable[tuple[int, float, float]], top: list[Pair]) -> Iterator[Candidate]:
    """From (token, value, the model's log-probability); what cannot happen is left out."""
    wanted = seq.top_logprobs
    shown = Alternatives.of(top[: wanted or 0])
    for token, value, log_prob in kept:
        if value != float("-inf"):
            yield Candidate(token, value, None if wanted is None else TokenLogprobs(token, log_prob, shown))


def enough(candidates: Iterable[Candidate], count: int, stop_ids: frozenset[int]) -> Iterator[Candidate]:
    """Up to the `count`-th that is no stop token."""
    for candidate in candidates:
        if count == 0:
            return
        count -= candidate.token not in stop_ids
        yield candidate


def ranked_rows(sequences: list[Sequence], ids: Tensor, log_probs: Tensor) -> list[Row | str]:
    """Rows of the ranks' likeliest tokens, or what is wrong with one."""
    tokens, values = ids.tolist(), log_probs.tolist()
    return [
        DAMAGED if row[0] != row[0] else RankedRow(seq, list(zip(tokens[i], row, strict=True)))
        for i, (seq, row) in enumerate(zip(sequences, values, strict=True))
    ]


def whole_rows(sequences: list[Sequence], logits_RV: Tensor, normaliser_R: Tensor) -> list[Row | str]:
    """Gathered rows, or what is wrong with one."""
    log_probs_RV = logits_RV - normaliser_R[:, None]
    damaged = (~normaliser_R.isfinite()).tolist()
    return [DAMAGED if damaged[i] else WholeRow(seq, log_probs_RV[i]) for i, seq in enumerate(sequences)]


DAMAGED = "the model's logits have no finite log-sum-exp: its weights or activations overflowed or are damaged"
