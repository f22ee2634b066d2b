"""A call's stream and, for each prompt that is to be computed, its entry: at admission, and when it is replayed."""

from __future__ import annotations

import asyncio
import itertools
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial

from cluster.engine.request import Request
from cluster.frontend.call_traces import trace_of
from cluster.frontend.fleet.open_requests import Entry, SampleState
from cluster.frontend.output.best_of_filter import BestOf
from cluster.frontend.output.output_text import SampleText, TextCodec, stop_strings
from cluster.frontend.output.streams import Chunk, Stream
from parallel.errors import RequestError

TURN = 64
"""Prompts that are opened between two looks at others."""


class RequestBuilder:
    """Gives requests names that the engine has not heard before. `leave` is called with a stream that is closed."""

    def __init__(self, codec: TextCodec | None, leave: Callable[[Stream], None]) -> None:
        self._codec, self._leave = codec, leave
        self._names = itertools.count()
        self._nonce = secrets.token_hex(4)  # late events of an earlier front-end never match

    def open(self, call_id: str, shown: int, made: Sequence[Request | RequestError]) -> tuple[Stream, list[Entry]]:
        """Of `shown` samples for each prompt; one that was refused fails in its place."""
        stream, now = Stream(call_id, self._leave), time.monotonic()
        opened = [self._opened(stream, index, shown, item, now) for index, item in enumerate(made)]
        return stream, [entry for entry in opened if entry is not None]

    async def open_in_turns(
        self, call_id: str, shown: int, made: Sequence[Request | RequestError]
    ) -> tuple[Stream, list[Entry]]:
        """`open`, with the loop for others meanwhile."""
        stream, now = Stream(call_id, self._leave), time.monotonic()
        entries: list[Entry] = []
        for index, item in enumerate(made):
            if index % TURN == TURN - 1:
                await asyncio.sleep(0)
            if (entry := self._opened(stream, index, shown, item, now)) is not None:
                entries.append(entry)
        return stream, entries

    def _opened(self, stream: Stream, index: int, shown: int, item: Request | RequestError, now: float) -> Entry | None:
        stream.expect(index, shown)
        if isinstance(item, RequestError):
            stream.put(Chunk(prompt_index=index, error=item))
            return None
        return self._entry(item, index, stream, now)

    def _entry(self, request: Request, index: int, stream: Stream, now: float) -> Entry:
        call_id = request.request_id
        trace = trace_of(request, index, now)
        name = f"{call_id}/{index}#{self._nonce}{next(self._names)}"
        request = replace(request, request_id=name, traced=trace is not None)
        echo = request.response.echo and self._codec is not None
        prefix = cache(partial(self._codec.tokenizer.decode, request.token_ids)) if echo and self._codec else None
        stops = stop_strings(self._codec, request.stopping)
        samples = [
            SampleState(text=SampleText(self._codec, request.stopping, stops), prefix=prefix)
            for _ in range(request.sampling.num_samples)
        ]
        best_of = None if request.sampling.best_of is None else BestOf(request.sampling.n, len(samples))
        return Entry(
            request=request, call_id=call_id, prompt_index=index, stream=stream, samples=samples, admitted=now,
            best_of=best_of, trace=trace,
        )  # fmt: skip
