"""Which of a step's sequences bring drafts, and how many tokens: while the step is short, and while drafts come true.

Rows beside a decoding row cost little as long as a step waits for the weights, and as much as any other beyond. So a
step never has more than `max_rows` rows with drafts, and none beside more than that of its own. Drafts take cache
blocks that nobody needs; for them no sequence is set aside. Positions beyond the last token that may be generated are
not drafted: their keys would have no place.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from collections.abc import Sequence as Many

from cluster.engine.engine_config import EngineConfig
from cluster.engine.kv_cache.kv_cache_manager import KVCacheManager
from cluster.engine.sequences.sequence import Sequence
from cluster.engine.speculate.draft_length import DraftLength
from cluster.engine.speculate.drafter import Drafter
from cluster.engine.speculate.ngram_drafter import NGramDrafter

log = logging.getLogger(__name__)

SPARED = 2
"""Free blocks of each running sequence that drafts leave to others."""


class Speculator:
    """Asks a drafter for a step's drafts; without one there are none. `vocab_size`: ids from there on are refused."""

    def __init__(self, config: EngineConfig, residents: KVCacheManager, vocab_size: int) -> None:
        given = config.speculation
        self.drafter: Drafter | None = NGramDrafter(given) if given.method == "ngram" else None
        self._most, self._rows = given.num_speculative_tokens, min(given.max_rows, config.max_step_tokens)
        self._residents, self._vocab_size = residents, vocab_size
        self._lengths: dict[Sequence, DraftLength] = {}
        self._warned = False

    def drafts(self, chosen: Mapping[Sequence, int]) -> dict[Sequence, list[int]]:
        """Drafts for the sequences of a step, of which so many tokens each are computed anyway."""
        if self.drafter is None:
            return {}
        left = self._rows - sum(chosen.values())
        able = [seq for seq in chosen if may_draft(seq)] if left > 0 else []
        made: dict[Sequence, list[int]] = {}
        for place, seq in enumerate(able):
            draft = self._draft(self.drafter, seq, -(-left // (len(able) - place)))
            if draft:
                made[seq] = draft
                left -= len(draft)
        return made

    def settle(self, seq: Sequence, drafted: int, accepted: int) -> None:
        """How a sequence's draft fared."""
        if seq in self._lengths:
            self._lengths[seq].settle(drafted, accepted)

    def ended(self, seq: Sequence) -> None:
        """Nothing more is drafted for it."""
        self._lengths.pop(seq, None)
        if self.drafter is None or not seq.answer.request.continues:
            return
        try:
            self.drafter.ended(seq)
        except Exception as error:  # noqa: BLE001 (a guess, nobody's fault)
            self._refuse("raised %s: %s", type(error).__name__, error)

    def _draft(self, drafter: Drafter, seq: Sequence, most: int) -> list[int]:
        length = self._lengths.get(seq)
        if length is None:
            length = self._lengths[seq] = DraftLength(self._most)
        most = min(most, length.next(), seq.max_tokens - len(seq.tokens) - 1)
        if most < 1:
            return []
        try:
            draft = self._within(drafter.propose(seq, most), most)
            if seq.guide is not None and draft:
                draft = seq.guide.allowed(seq.tokens, draft)
        except Exception as error:  # noqa: BLE001 (a guess, nobody's fault)
            self._refuse("raised %s: %s", type(error).__name__, error)
            return []
        return draft[: self._room(seq, len(draft))]

    def _within(self, proposed: Many[int], most: int) -> list[int]:
        """The tokens before the first that is none of the vocabulary's."""
        draft = list(proposed[:most])
        for place, token in enumerate(draft):
            if type(token) is not int or not 0 <= token < self._vocab_size:
                self._refuse("proposed %r; ids are whole numbers from 0 to %d", token, self._vocab_size - 1)
                return draft[:place]
        return draft

    def _refuse(self, problem: str, *values: object) -> None:
        if not self._warned:
            self._warned = True
            log.warning(
                "the drafter %s " + problem + "; such drafts are left out", type(self.drafter).__name__, *values
            )

    def _room(self, seq: Sequence, most: int) -> int:
        """Tokens, at most `most`, whose keys have a place behind the sequence's last one."""
        residents = self._residents
        size, needed = residents.pool.block_size, seq.computed + 1 + most
        while len(seq.blocks) * size < needed and residents.pool.num_free > SPARED * len(residents.running):
            residents.grow(seq)
        return min(most, len(seq.blocks) * size - seq.computed - 1)


def may_draft(seq: Sequence) -> bool:
    """Whether its last token alone is computed in this step, and one follows that is drawn and shared with nobody.

    Where no run of tokens may come twice, whatever was found in earlier text is forbidden.
    """
    given = seq.sampling
    drawn = seq.computed == len(seq.tokens) - 1 >= seq.prompt_len and seq.answer.request.continues
    return drawn and not (seq.forks or seq.beam is not None or given.no_speculation or given.no_repeat_ngram_size)
