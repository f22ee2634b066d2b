"""An engine without a model and a tokenizer of a few pieces, for tests of what is above the engine.

The token at each place is a function of (prompt, seed, sample, place), so that what a stream must hold can be computed
beforehand, also across a restart. `Block` accounting is one block per live sample.
"""

from __future__ import annotations

import codecs
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from cluster.engine.request import (
    EngineLoad,
    FinishReason,
    ModelLimits,
    Request,
    Timings,
    TokenEvent,
    TokenLogprobs,
)
from cluster.engine.request_validation import validate
from cluster.engine.top_logprobs import Alternatives
from cluster.frontend.output.output_text import TextCodec
from parallel.errors import CapacityError

PIECES = (
    b"a",
    b"b",
    b"c",
    b"ab",
    b"ba",
    b" ",
    b"abc",
    b"\n",
    b"x",
    b"yz",
    "é".encode(),
    "日".encode()[:1],
    "日".encode()[1:],
)
UNKNOWN = PIECES.index(b"x")
LIMITS = ModelLimits(vocab_size=len(PIECES), max_context=256, kv_capacity_tokens=1 << 20, max_batch=0)
ENDLESS = replace(LIMITS, max_context=1 << 30, kv_capacity_tokens=1 << 40)
"""With these a request for LASTING tokens is still open when the slowest machine gets to ending it."""
LASTING = 1 << 24


class PieceTokenizer:
    """Longest piece first; one token stands for one piece of bytes."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        data, ids = text.encode(), []
        while data:
            fits = [i for i, piece in enumerate(PIECES) if data.startswith(piece)]
            best = max(fits, key=lambda i: len(PIECES[i]), default=UNKNOWN)
            ids.append(best)
            data = data[len(PIECES[best]) if fits else 1 :]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(PIECES[i] for i in ids).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        return PIECES[token_id]


class PieceDetokenizer:
    """UTF-8, incrementally."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: Sequence[int]) -> str:
        return self._decoder.decode(b"".join(PIECES[i] for i in ids))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


CODEC = TextCodec(tokenizer=PieceTokenizer(), detokenizer=PieceDetokenizer)


def token_at(prompt: Sequence[int], seed: int | None, sample: int, place: int, vocab_size: int = len(PIECES)) -> int:
    return zlib.crc32(repr((tuple(prompt), seed, sample, place)).encode()) % vocab_size


def tokens_of(prompt: Sequence[int], seed: int | None, sample: int, count: int) -> list[int]:
    return [token_at(prompt, seed, sample, place) for place in range(count)]


@dataclass
class Live:
    """A request in the fake engine."""

    request: Request
    started: float
    samples: dict[int, list[int]]
    scored: bool = False


@dataclass
class FakeEngine:
    """As Engine's surface, with a step that takes `step_seconds` and hands out `tokens_per_step` per sample."""

    limits: ModelLimits = LIMITS
    step_seconds: float = 0.0
    tokens_per_step: int = 1
    held: bool = False  # steps do nothing
    crash_at_step: int | None = None
    reject_prompt: tuple[int, ...] | None = None
    error_on_prompt: tuple[int, ...] | None = None
    live: dict[str, Live] = field(default_factory=dict)
    pending: list[TokenEvent] = field(default_factory=list)
    steps: int = 0
    submitted: int = 0
    kept_alive: int = 0
    canaries: int = 0
    canary_fault: str = ""

    @property
    def idle(self) -> bool:
        return not self.live and not self.pending

    def submit(self, request: Request) -> Request:
        validate(request, self.limits)
        if request.token_ids == self.reject_prompt:
            raise CapacityError("told to reject")
        self.submitted += 1
        count = 1 if request.score_only else request.sampling.n
        resumed = [list(ids) for ids in request.resumed_ids] or [[] for _ in range(count)]
        samples = {i: resumed[i] for i in range(count) if i not in request.finished_samples}
        self.live[request.request_id] = Live(request, time.monotonic(), samples)
        return request

    def abort(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            live = self.live.pop(request_id, None)
            for index in live.samples if live else ():
                self._end(request_id, index, FinishReason.ABORTED)

    def abort_samples(self, samples: Sequence[tuple[str, int]]) -> None:
        for request_id, index in samples:
            live = self.live.get(request_id)
            if live and live.samples.pop(index, None) is not None:
                self._end(request_id, index, FinishReason.ABORTED)
                self._tidy(request_id)

    def step(self) -> list[TokenEvent]:
        self.steps += 1
        if self.crash_at_step is not None and self.steps >= self.crash_at_step:
            raise RuntimeError("the fake engine was told to fail")
        if self.step_seconds:
            time.sleep(self.step_seconds)
        if self.held:
            return []
        events, self.pending = self.pending, []
        for live in tuple(self.live.values()):
            events += self._advance(live)
        return events

    def load(self) -> EngineLoad:
        used = sum(len(live.samples) for live in self.live.values())
        return EngineLoad(
            running=len(self.live), kv_blocks_total=1 << 16, kv_blocks_free=(1 << 16) - used, steps=self.steps
        )

    def prove(self) -> EngineLoad:
        self.canaries += 1
        return replace(self.load(), canaries=self.canaries, canary_fault=self.canary_fault)

    def keep_alive(self) -> None:
        self.kept_alive += 1

    def _advance(self, live: Live) -> list[TokenEvent]:
        request = live.request
        if request.token_ids == self.error_on_prompt:
            del self.live[request.request_id]
            return [TokenEvent(request_id=request.request_id, finish_reason=FinishReason.ERROR, error="told to fail")]
        prompt_logprobs = None
        if request.response.prompt_logprobs is not None and not live.scored:
            live.scored = True
            prompt_logprobs = scores_of(request.token_ids)
        if request.score_only:
            del self.live[request.request_id]
            return [
                TokenEvent(
                    request_id=request.request_id, prompt_logprobs=prompt_logprobs, finish_reason=FinishReason.LENGTH
                )
            ]
        events = []
        for index, tokens in tuple(live.samples.items()):
            events.append(self._grow(live, index, tokens, prompt_logprobs))
            prompt_logprobs = None
        self._tidy(request.request_id)
        return events

    def _grow(
        self, live: Live, index: int, tokens: list[int], prompt_logprobs: tuple[TokenLogprobs, ...] | None
    ) -> TokenEvent:
        request, most = live.request, live.request.stopping.max_new_tokens or 16
        count = min(self.tokens_per_step, most - len(tokens))
        new = [token_at(request.token_ids, request.sampling.seed, index, len(tokens) + i) for i in range(count)]
        tokens += new
        done = len(tokens) >= most
        if done:
            del live.samples[index]
        wanted = request.response.logprobs is not None
        return TokenEvent(
            request_id=request.request_id,
            sample_index=index,
            token_ids=tuple(new),
            logprobs=tuple(TokenLogprobs(t, -float(t) - 0.5, Alternatives.of([(t, -0.5)])) for t in new if wanted),
            prompt_logprobs=prompt_logprobs,
            finish_reason=FinishReason.LENGTH if done else None,
            weight_version=7,
            timings=Timings(0.0, 0.0, time.monotonic() - live.started) if done else None,
        )

    def _end(self, request_id: str, index: int, reason: FinishReason) -> None:
        self.pending.append(TokenEvent(request_id=request_id, sample_index=index, finish_reason=reason))

    def _tidy(self, request_id: str) -> None:
        if request_id in self.live and not self.live[request_id].samples:
            del self.live[request_id]


def scores_of(prompt: Sequence[int]) -> tuple[TokenLogprobs, ...]:
    return tuple(
        TokenLogprobs(token, -0.25 * place, Alternatives.of([(token, -0.25 * place)]))
        for place, token in enumerate(prompt[1:], 1)
    )
