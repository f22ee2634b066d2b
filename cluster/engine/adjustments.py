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

In a beam search the row holds log-probabilities, as there. Everything is element by element in float32 on one row, so
a row's bits cannot depend on its neighbours.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from cluster.engine.request import SamplingParams
from cluster.engine.sequence import Sequence

NEVER = float("-inf")


class Adjustments:
    """One sample's adjustments; remembers what it has already counted, so a step costs only what is new."""

    def __init__(self, seq: Sequence, vocab_size: int, device: torch.device) -> None:
        given = seq.sampling
        self.vocab_size, self.device = vocab_size, device
        self.bias_ids = self._ids(list(given.logit_bias))
        self.bias = torch.tensor(list(given.logit_bias.values()), dtype=torch.float32, device=device)
        self.stop_ids = self._ids(sorted(seq.stop_ids))
        self.allowed = None if given.allowed_token_ids is None else self._ids(sorted(set(given.allowed_token_ids)))
        self.banned = self._ids([word[0] for word in given.bad_words if len(word) == 1])
        self.words = [word for word in given.bad_words if len(word) > 1]
        self.history = torch.zeros(0, dtype=torch.long, device=device)
        self.counts = torch.zeros(vocab_size if _counts(given) else 0, dtype=torch.float32, device=device)
        self.counted = seq.prompt_len
        self.ngrams = NGrams(given.no_repeat_ngram_size) if given.no_repeat_ngram_size else None

    def _ids(self, ids: list[int]) -> Tensor:
        return torch.tensor(ids, dtype=torch.long, device=self.device)

    def apply(self, row_V: Tensor, seq: Sequence, diversity: Mapping[int, float] | None = None) -> None:
        """Changes the row in place."""
        if len(self.bias_ids):
            row_V[self.bias_ids] += self.bias
        if diversity:
            row_V[self._ids(list(diversity))] -= torch.tensor(
                list(diversity.values()), dtype=torch.float32, device=self.device
            )
        given = seq.sampling
        if given.repetition_penalty != 1.0:
            self._penalise_repetition(row_V, seq.tokens, given.repetition_penalty)
        if _counts(given) and len(seq.tokens) > seq.prompt_len:
            self._penalise_counts(row_V, seq)
        if self.ngrams is not None:
            row_V[self._ids(self.ngrams.banned_after(seq.tokens))] = NEVER
        if len(self.banned):
            row_V[self.banned] = NEVER
        for word in self.words:
            if tuple(seq.tokens[1 - len(word) :]) == word[:-1]:
                row_V[word[-1]] = NEVER
        if seq.position < seq.min_tokens and len(self.stop_ids):
            row_V[self.stop_ids] = NEVER
        if self.allowed is not None:
            kept = row_V[self.allowed]
            row_V.fill_(NEVER)
            row_V[self.allowed] = kept

    def _penalise_repetition(self, row_V: Tensor, tokens: list[int], penalty: float) -> None:
        new = tokens[len(self.history) :]
        self.history = torch.cat([self.history, self._ids(new)])
        seen = row_V[self.history]
        row_V[self.history] = torch.where(seen > 0, seen / penalty, seen * penalty)

    def _penalise_counts(self, row_V: Tensor, seq: Sequence) -> None:
        for token in seq.tokens[self.counted :]:
            self.counts[token] += 1.0
        self.counted = len(seq.tokens)
        ids = self._ids(seq.tokens[seq.prompt_len :])  # a token seen twice is written twice, with the same value
        given = seq.sampling
        row_V[ids] = row_V[ids] - (given.frequency_penalty * self.counts[ids] + given.presence_penalty)


class NGrams:
    """Which tokens followed each run of size - 1 tokens so far; a longer sequence only adds to it."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.followers: dict[tuple[int, ...], list[int]] = {}
        self.seen = size - 1  # tokens whose n-gram is known

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
