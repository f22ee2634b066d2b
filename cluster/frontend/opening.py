"""A call's stream and, for each prompt that is to be computed, its entry: at admission, and when it is replayed."""

from __future__ import annotations

import itertools
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from cluster.engine.request import Request
from cluster.frontend.best_of import BestOf
from cluster.frontend.journal import Entry, SampleState
from cluster.frontend.streams import Chunk, Stream
from cluster.frontend.text import SampleText, TextCodec, stop_strings
from cluster.frontend.tracing import trace_of
from parallel.errors import RequestError


class Opener:
    """Gives requests names that the engine has not heard before. `leave` is called with a stream that is closed."""

    def __init__(self, codec: TextCodec | None, leave: Callable[[Stream], None]) -> None:
        self._codec, self._leave = codec, leave
        self._names = itertools.count()
        self._nonce = secrets.token_hex(4)  # late events of an earlier front-end never match

    def open(self, call_id: str, shown: int, made: Sequence[Request | RequestError]) -> tuple[Stream, list[Entry]]:
        """Of `shown` samples for each prompt; one that was refused fails in its place."""
        now = time.monotonic()
        stream = Stream(call_id, self._leave)
        entries: list[Entry] = []
        for index, item in enumerate(made):
            stream.expect(index, shown)
            if isinstance(item, RequestError):
                stream.put(Chunk(prompt_index=index, error=item))
            else:
                entries.append(self._entry(item, index, stream, now))
        return stream, entries

    def _entry(self, request: Request, index: int, stream: Stream, now: float) -> Entry:
        call_id = request.request_id
        trace = trace_of(request, index, now)
        name = f"{call_id}/{index}#{self._nonce}{next(self._names)}"
        request = replace(request, request_id=name, traced=trace is not None)
        prefix = self._codec.tokenizer.decode(request.token_ids) if request.response.echo and self._codec else ""
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
