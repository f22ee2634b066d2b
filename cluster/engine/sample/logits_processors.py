"""What a request asks to be done to a row of logits before its token is chosen.

In this order, which is transformers' (`generate` builds its processors so):

    logit bias           x[t] += bias[t]
    diversity            x[t] -= penalty * beams of earlier groups that took t in this step  (diverse beam search)
    repetition penalty   for t in prompt or output: x[t] = x[t] / r if x[t] > 0 else x[t] * r   (Keskar et al. 2019)
    presence, frequency  for t in output, seen c times: x[t] -= frequency * c + presence        (OpenAI; not the prompt)
    no repeated n-gram   whatever followed the last n - 1 tokens before, prompt included: x[t] = -inf
    bad words            the last token of a word whose other tokens have just been produced: x[t] = -inf
    minimum length       end-of-sequence and stop tokens: x[t] = -inf until min_new_tokens are there
    allowed tokens       all others: x[t] = -inf
    grammar              what it does not allow: x[t] = -inf  (of a beam; others' rows come so: token_masks.py)

In a beam search the row holds log-probabilities, as there. Everything is element by element in float32 on one row, so
a row's bits cannot depend on its neighbours.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from collections.abc import Sequence as Many
from copy import copy
from functools import cached_property

import torch
from torch import Tensor

from cluster.engine.request import SamplingParams
from cluster.engine.sample.token_masks import NEVER, forbid
from cluster.engine.sequences.sequence import Sequence


class Fixed:
    """What a request asks of every row alike, as rows of the vocabulary's length: made once, shared by its samples."""

    def __init__(self, given: SamplingParams, stop_ids: frozenset[int], vocab_size: int, device: torch.device) -> None:
        self.device = device
        self.bias = None
        if given.logit_bias:
            self.bias = torch.zeros(vocab_size, dtype=torch.float32, device=device)
            values = torch.tensor(list(given.logit_bias.values()), dtype=torch.float32, device=device)
            self.bias[self.ids(list(given.logit_bias))] = values
        self.stops = self._mask(vocab_size, list(stop_ids)) if stop_ids else None
        banned = [word[0] for word in given.bad_words if len(word) == 1]
        self.never = self._mask(vocab_size, banned) if banned else None
        if given.allowed_token_ids is not None:
            others = ~self._mask(vocab_size, list(given.allowed_token_ids))
            self.never = others if self.never is None else self.never | others
        self.words = BadWords([word for word in given.bad_words if len(word) > 1])

    @cached_property
    def others(self) -> Tensor:
        """The ids of tokens that do not stop, ascending."""
        assert self.stops is not None, "asked for where some stop"
        return (~self.stops).nonzero()[:, 0]

    def ids(self, ids: list[int]) -> Tensor:
        return torch.tensor(ids, dtype=torch.long, device=self.device)

    def _mask(self, vocab_size: int, ids: list[int]) -> Tensor:
        mask = torch.zeros(vocab_size, dtype=torch.bool, device=self.device)
        mask[self.ids(ids)] = True
        return mask


class FixedOfCalls:
    """The last few requests' `Fixed`: prompts of one call, whose lists are the same objects, share one."""

    def __init__(self, most: int = 8) -> None:
        self._most = most
        self._made: OrderedDict[object, tuple[SamplingParams, Fixed]] = OrderedDict()

    def get(self, given: SamplingParams, stop_ids: frozenset[int], vocab_size: int, device: torch.device) -> Fixed:
        lists = (id(given.logit_bias), id(given.allowed_token_ids), id(given.bad_words))
        key = (lists, stop_ids, vocab_size, device)
        if key not in self._made:
            # with `given`, so that no other list can get the same id meanwhile
            self._made[key] = given, Fixed(given, stop_ids, vocab_size, device)
            if len(self._made) > self._most:
                self._made.popitem(last=False)
        self._made.move_to_end(key)
        return self._made[key][1]


FIXED = FixedOfCalls()


class LogitsProcessors:
    """One sample's adjustments; remembers what it has already counted, so a step costs only what is new."""

    def __init__(self, seq: Sequence, vocab_size: int, device: torch.device) -> None:
        given = seq.sampling
        self.fixed = FIXED.get(given, seq.stop_ids, vocab_size, device)
        self.history = torch.zeros(0, dtype=torch.long, device=device)
        self.counts = torch.zeros(vocab_size if _counts(given) else 0, dtype=torch.float32, device=device)
        self.counted = seq.prompt_len
        self.ngrams = NGrams(given.no_repeat_ngram_size) if given.no_repeat_ngram_size else None

    def copy(self) -> LogitsProcessors:
        """Of a beam that goes on from the same tokens."""
        made = copy(self)
        made.counts = self.counts.clone()
        made.ngrams = None if self.ngrams is None else self.ngrams.copy()
        return made

    def apply(self, row_V: Tensor, seq: Sequence, diversity: Mapping[int, float] | None = None) -> None:
        """Changes the row in place."""
        fixed, given = self.fixed, seq.sampling
        if fixed.bias is not None:
            row_V += fixed.bias
        if diversity:
            prices = torch.tensor(list(diversity.values()), dtype=torch.float32, device=fixed.device)
            row_V[fixed.ids(list(diversity))] -= prices
        if given.repetition_penalty != 1.0:
            self._penalise_repetition(row_V, seq.tokens, given.repetition_penalty)
        if _counts(given) and len(seq.tokens) > seq.prompt_len:
            self._penalise_counts(row_V, seq)
        banned = fixed.words.banned_after(seq.tokens)
        if self.ngrams is not None:
            banned = banned + self.ngrams.banned_after(seq.tokens)
        if banned:
            row_V[fixed.ids(banned)] = NEVER
        if fixed.never is not None:
            row_V.masked_fill_(fixed.never, NEVER)
        if seq.position < seq.min_tokens and fixed.stops is not None:
            row_V.masked_fill_(fixed.stops, NEVER)
        if seq.guide is not None and seq.beam is not None:
            forbid(row_V[None], [(0, seq.guide.mask(seq.tokens))], 0)

    def _penalise_repetition(self, row_V: Tensor, tokens: list[int], penalty: float) -> None:
        new = tokens[len(self.history) :]
        self.history = torch.cat([self.history, self.fixed.ids(new)])
        seen = row_V[self.history]
        row_V[self.history] = torch.where(seen > 0, seen / penalty, seen * penalty)

    def _penalise_counts(self, row_V: Tensor, seq: Sequence) -> None:
        for token in seq.tokens[self.counted :]:
            self.counts[token] += 1.0
        self.counted = len(seq.tokens)
        ids = self.fixed.ids(seq.tokens[seq.prompt_len :])  # a token seen twice is written twice, with the same value
        given = seq.sampling
        row_V[ids] = row_V[ids] - (given.frequency_penalty * self.counts[ids] + given.presence_penalty)


def adjustments_of(seq: Sequence, vocab_size: int, device: torch.device) -> LogitsProcessors:
    """Those of a sequence, made at its first draw."""
    if seq.adjustments is None:
        seq.adjustments = LogitsProcessors(seq, vocab_size, device)
    assert isinstance(seq.adjustments, LogitsProcessors), "what is made here"
    return seq.adjustments


class BadWords:
    """Which token would complete a word. The words' beginnings as a trie that is read from their ends, so that a row
    costs as many steps as tokens match, however many words there are, and nothing has to be remembered between rows.
    """

    def __init__(self, words: Many[tuple[int, ...]]) -> None:
        self._root = _Node()
        for *beginning, last in words:
            node = self._root
            for token in reversed(beginning):
                node = node.before.setdefault(token, _Node())
            node.banned.append(last)

    def banned_after(self, tokens: Many[int]) -> list[int]:
        banned: list[int] = []
        before, place = self._root.before, len(tokens) - 1
        while before and place >= 0 and (node := before.get(tokens[place])) is not None:
            banned += node.banned
            before, place = node.before, place - 1
        return banned


class _Node:
    """The end of some words' beginnings: what may stand before it, and the tokens that complete those it is all of."""

    __slots__ = ("banned", "before")

    def __init__(self) -> None:
        self.before: dict[int, _Node] = {}
        self.banned: list[int] = []


class NGrams:
    """Which tokens followed each run of size - 1 tokens so far; a longer sequence only adds to it."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.followers: dict[tuple[int, ...], list[int]] = {}
        self.seen = size - 1  # tokens whose n-gram is known

    def copy(self) -> NGrams:
        made = copy(self)
        made.followers = {run: [*after] for run, after in self.followers.items()}
        return made

    def banned_after(self, tokens: list[int]) -> list[int]:
        """The tokens that would complete an n-gram for the second time."""
        before = self.size - 1
        for end in range(self.seen, len(tokens)):
            self.followers.setdefault(tuple(tokens[end - before : end]), []).append(tokens[end])
        self.seen = max(self.seen, len(tokens))
        return self.followers.get(tuple(tokens[len(tokens) - before :]), []) if len(tokens) >= before else []


def _counts(given: SamplingParams) -> bool:
    return given.presence_penalty != 0.0 or given.frequency_penalty != 0.0


def adjusts(seq: Sequence) -> bool:
    """Whether the sample's next row is changed at all."""
    given = seq.sampling
    return bool(
        given.logit_bias
        or given.repetition_penalty != 1.0
        or _counts(given)
        or given.bad_words
        or given.no_repeat_ngram_size
        or given.allowed_token_ids is not None
        or (seq.position < seq.min_tokens and seq.stop_ids)
    )
