"""An executor without a model: it keeps a paged "cache" of token ids, and a next token is a hash of what it reads back.

It sees what a real rank sees (the plan's wire form), so a wrong table, a missing copy, a lost chunk or a block that
is used twice changes the tokens that come out. `reference` says what must come out.
"""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Sequence as Many
from typing import Any

from msgspec import msgpack

from cluster.engine.engine import Engine
from cluster.engine.engine_config import EngineConfig
from cluster.engine.request import FinishReason, ModelLimits, Request, TokenLogprobs
from cluster.engine.rng import stream_of
from cluster.engine.schedule.step_plan import StepPlan, StepResult

VOCAB = 50
EOS = 7
LIMITS = ModelLimits(vocab_size=VOCAB, max_context=64, kv_capacity_tokens=0, eos_token_ids=(EOS,))


class Clock:
    """A clock that only moves when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def next_token(tokens: Many[int], stream: int, banned: frozenset[int] = frozenset()) -> int:
    """Depends on every token of the sequence and its order."""
    token = zlib.crc32(array("q", [*tokens, stream & 0xFFFF]).tobytes()) % VOCAB
    while token in banned:
        token = (token + 1) % VOCAB
    return token


def logprob_of(tokens: Many[int], target: int) -> float:
    return -float(zlib.crc32(array("q", [*tokens, target]).tobytes()) % 1000)


class FakeExecutor:
    """Executes plans over a cache of token ids."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.cache: dict[tuple[int, int], int] = {}
        self.tables: dict[int, list[int]] = {}
        self.plans: list[StepPlan] = []
        self.keep_alives = 0

    def execute(self, plan: StepPlan) -> StepResult:
        seen = StepPlan.from_wire(msgpack.decode(msgpack.encode(plan.wire()), type=tuple[Any, ...]))
        self.plans.append(seen)
        self._follow(seen)
        contexts = self._contexts(seen)
        result = StepResult(tokens=[])
        for row, seq in zip(seen.rows, plan.sampled, strict=False):
            if len(result.tokens) < plan.num_argmax:
                result.tokens.append(next_token(contexts[row], 0))
            else:
                banned = seq.stop_ids if seq.position < seq.min_tokens else frozenset()
                stream = 0 if seq.plain and not banned else seq.stream
                result.tokens.append(next_token(contexts[row], stream, banned))
        row = len(plan.sampled)
        for score in plan.gathered_scores:
            result.gathered_scores.append(self._score(contexts, seen.rows, row, score.targets))
            row += len(score.targets)
        for score in plan.plain_scores:
            result.plain_scores.append(self._score(contexts, seen.rows, row, score.targets))
            row += len(score.targets)
        assert row == len(seen.rows)
        return result

    def keep_alive(self) -> None:
        self.keep_alives += 1

    def close(self) -> None:
        pass

    def _follow(self, plan: StepPlan) -> None:
        for slot, first, blocks in plan.tables:
            self.tables.setdefault(slot, [])[first:] = blocks
        old = dict(self.cache)
        for source, target in plan.copies:
            for offset in range(self.block_size):
                self.cache[target, offset] = old.get((source, offset), -1)

    def _contexts(self, plan: StepPlan) -> list[list[int]]:
        """For each token of the plan: all tokens up to it, as read from the cache after everything is written."""
        spans, at = [], 0
        for slot, count, context in zip(plan.slots, plan.query_lens, plan.context_lens, strict=True):
            for position, token in zip(range(context - count, context), plan.tokens[at : at + count], strict=True):
                self.cache[self._place(slot, position)] = token
            at += count
            spans.append((slot, count, context))
        contexts = []
        for slot, count, context in spans:
            read = [self.cache[self._place(slot, position)] for position in range(context)]
            contexts += [read[: stop + 1] for stop in range(context - count, context)]
        return contexts

    def _place(self, slot: int, position: int) -> tuple[int, int]:
        return self.tables[slot][position // self.block_size], position % self.block_size

    def _score(self, contexts: list[list[int]], rows: list[int], first: int, targets: list[int]) -> list[TokenLogprobs]:
        return [
            TokenLogprobs(target, logprob_of(contexts[rows[first + i]], target)) for i, target in enumerate(targets)
        ]


def reference(request: Request, sample_index: int) -> tuple[list[int], FinishReason]:
    """What a request resolved by the engine must answer."""
    given, stopping = request.sampling, request.stopping
    plain = given.greedy and request.response.logprobs is None
    stop_ids = frozenset({*stopping.stop_token_ids, *(() if stopping.ignore_eos else (EOS,))})
    tokens = list(request.token_ids)
    new: list[int] = []
    while True:
        banned = stop_ids if len(new) < stopping.min_new_tokens else frozenset()
        stream = 0 if plain and not banned else stream_of(given.seed or 0, sample_index)
        token = next_token(tokens, stream, banned)
        tokens.append(token)
        if token in stop_ids:
            return new + ([token] if stopping.include_stop_sequence else []), FinishReason.STOP
        new.append(token)
        if len(new) == stopping.max_new_tokens:
            return new, FinishReason.LENGTH


def fake_engine(num_blocks: int = 32, clock: Clock | None = None, **options: object) -> tuple[Engine, FakeExecutor]:
    """An engine over the fake executor; small sizes, so that limits are met."""
    sizes: dict[str, object] = {
        "block_size": 4,
        "max_step_tokens": 16,
        "max_sequences": 6,
        "max_scored_tokens": 5,
        **options,
    }
    config = EngineConfig(**sizes)  # type: ignore[arg-type]
    executor = FakeExecutor(config.block_size)
    return Engine(executor, LIMITS, config, num_blocks, clock or Clock()), executor
