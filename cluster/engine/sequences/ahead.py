"""A sequence as it will be if its draft comes true: what is drawn after each of the draft's tokens."""

from __future__ import annotations

from collections.abc import Sequence as Many

from cluster.engine.sequences.sequence import Sequence


class Ahead(Sequence):
    """`of` and some tokens of its draft. The sampler reads it as any sequence; it holds no slot, no block, no place in
    a queue, and is dropped after its step. What penalties have counted is a copy, so `of` never sees a draft.
    """

    __slots__ = ("of",)

    def __init__(self, of: Sequence, draft: Many[int]) -> None:
        self.of = of
        self.answer, self.index, self.order, self.request_id = of.answer, of.index, of.order, of.request_id
        self.tokens, self.prompt_len = [*of.tokens, *draft], of.prompt_len
        self.stop_ids, self.max_tokens, self.min_tokens = of.stop_ids, of.max_tokens, of.min_tokens
        self.sampling, self.top_logprobs, self.stream = of.sampling, of.top_logprobs, of.stream
        self.flow, self.beam, self.done, self.plain = of.flow, None, False, of.plain
        self.guide = None  # whose mask the plan holds already
        self.adjustments = None if of.adjustments is None else of.adjustments.copy()

    @property
    def came_true(self) -> bool:
        """Whether the sequence has gone on exactly so; to be asked before the token after it is appended."""
        now = self.of.tokens
        return not self.of.done and len(now) == len(self.tokens) and now[-1] == self.tokens[-1]
