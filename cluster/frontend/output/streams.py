"""What a caller reads: chunks of samples, coalesced while nobody reads.

A stream holds at most one unread chunk per sample, which grows by the tokens that arrive meanwhile: its memory is
bounded by the request's own limits, and a reader that is slow gets fewer, larger chunks and holds up nobody. Used
from one event loop only.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from cluster.engine.request import FinishReason, SamplingParams, StoppingCriteria, Timings, TokenLogprobs
from parallel.errors import TpError


@dataclass(frozen=True, kw_only=True)
class PromptInfo:
    """What is known of a prompt at admission: its tokens, and the parameters really used (seed drawn, length
    resolved).
    """

    num_tokens: int
    sampling: SamplingParams
    stopping: StoppingCriteria
    token_ids: tuple[int, ...] = ()  # with echo


@dataclass(kw_only=True)
class Chunk:
    """News of one sample. `error` ends its whole prompt; `prompt` comes with a prompt's first chunk."""

    prompt_index: int
    sample_index: int = 0
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None
    pooled: tuple[tuple[float, ...], ...] | None = None
    finish_reason: FinishReason | None = None
    stop_sequence: str | None = None
    stop_token_id: int | None = None
    stop_logprob: float | None = None
    score: float | None = None
    weight_version: int = 0
    timings: Timings | None = None
    prompt: PromptInfo | None = None
    error: TpError | None = None

    def extend(self, later: Chunk) -> None:
        """Append what came later of the same sample."""
        self.text += later.text
        self.token_ids += later.token_ids
        self.logprobs += later.logprobs
        for name in (
            "prompt_logprobs",
            "pooled",
            "finish_reason",
            "stop_sequence",
            "stop_token_id",
            "stop_logprob",
            "score",
            "timings",
            "prompt",
            "error",
        ):
            value = getattr(later, name)
            if value is not None:
                setattr(self, name, value)
        self.weight_version = max(self.weight_version, later.weight_version)


class Stream:
    """The chunks of one call, oldest sample first; ends when every prompt has ended. Leave it with `close`."""

    def __init__(self, request_id: str, on_close: Callable[[Stream], None]) -> None:
        self.request_id = request_id
        self.errors: dict[int, TpError] = {}
        """Prompts that failed, by index: also those refused at admission."""
        self._on_close = on_close
        self._open: set[tuple[int, int]] = set()
        self._unread: dict[tuple[int, int], Chunk] = {}
        self._fault: TpError | None = None
        self._news = asyncio.Event()

    def expect(self, prompt_index: int, num_samples: int) -> None:
        """Samples that will end with a finish reason, or with their prompt's error."""
        self._open.update((prompt_index, sample) for sample in range(num_samples))

    def put(self, chunk: Chunk) -> None:
        """Add news; merged into what is still unread of the same sample."""
        key = (chunk.prompt_index, chunk.sample_index)
        unread = self._unread.get(key)
        if unread is None:
            self._unread[key] = chunk
        else:
            unread.extend(chunk)
        if chunk.error is not None:
            self.errors[chunk.prompt_index] = chunk.error
            self._open -= {key for key in self._open if key[0] == chunk.prompt_index}
        elif chunk.finish_reason is not None:
            self._open.discard(key)
        self._news.set()

    def fail(self, error: TpError) -> None:
        """End the whole stream with an error, after what is still unread."""
        self._fault = error
        self._news.set()

    def close(self) -> None:
        """Stop what is still running. Harmless when everything has ended."""
        self._on_close(self)

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> Chunk:
        while True:
            if self._unread:
                return self._unread.pop(next(iter(self._unread)))
            if self._fault is not None:
                raise self._fault
            if not self._open:
                raise StopAsyncIteration
            self._news.clear()
            await self._news.wait()

    async def __aenter__(self) -> Stream:
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.close()


@dataclass(kw_only=True)
class Result:
    """Everything of one prompt: its samples' chunks put together, or its error."""

    prompt_index: int
    prompt: PromptInfo | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None
    samples: dict[int, Chunk] = field(default_factory=dict)
    error: TpError | None = None


def raise_if_all_failed(errors: Sequence[TpError | None]) -> None:
    """A call of which nothing succeeded fails as a whole, with its first prompt's error."""
    if errors and all(error is not None for error in errors):
        raise next(error for error in errors if error is not None)


async def collect(stream: Stream, num_prompts: int) -> list[Result]:
    """Read a stream to its end: one result per prompt, in order. Raises where every prompt failed."""
    results = [Result(prompt_index=index) for index in range(num_prompts)]
    async with stream:
        async for chunk in stream:
            result = results[chunk.prompt_index]
            result.prompt = chunk.prompt or result.prompt
            result.error = chunk.error or result.error
            if chunk.prompt_logprobs is not None:
                result.prompt_logprobs = chunk.prompt_logprobs
            sample = result.samples.get(chunk.sample_index)
            if sample is None:
                result.samples[chunk.sample_index] = chunk
            else:
                sample.extend(chunk)
    raise_if_all_failed([result.error for result in results])
    return results
