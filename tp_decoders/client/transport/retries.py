"""How a client's call outlives its server: when it is sent again, and what of a stream that begins again is news.

A retry carries the same request_id, so that a server which remembers the call gives the same answer. Whether it did is
checked, not believed: a stream goes on only after the very tokens and the text that were received, under the same seed.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field

import grpc

from tp_decoders.client.errors import ServiceError, made
from tp_decoders.protocol import inference_pb2 as inference

RETRY_SECONDS = 60.0
FIRST_PAUSE_S, MOST_PAUSE_S = 0.1, 2.0
PER_TOKEN = ("token_ids", "logprobs", "top_logprobs", "token_bytes")
IN_USE = "REQUEST_ID_IN_USE"
"""Of a retry: the server has not noticed yet that the connection before is lost."""


class Patience:
    """One call's: `seconds` without any answer, `overloads` refusals of a server that is full, and never past the
    call's deadline (`timeout` seconds from now; None: no deadline).
    """

    def __init__(self, seconds: float, timeout: float | None, overloads: int = 0) -> None:
        self._seconds = seconds
        self._deadline = None if timeout is None else time.monotonic() + timeout
        self._lost_at: float | None = None
        self._first: ServiceError | None = None
        self._retries = 0
        self._overloads = overloads
        self._pause = FIRST_PAUSE_S

    def time_left(self) -> float | None:
        return None if self._deadline is None else max(1e-3, self._deadline - time.monotonic())

    def rest(self) -> None:
        """There was an answer: the next loss is another one."""
        self._lost_at, self._first, self._pause = None, None, FIRST_PAUSE_S

    def wait(self, error: ServiceError, met: bool) -> Wait:
        """What to do before the call is sent again; raises the error where it must not be. Where there was no answer
        for too long that is the first one, which says what happened; where the call's deadline comes first, the
        deadline's, after the wait. `met`: whether the server has ever answered.
        """
        now = time.monotonic()
        if error.retry_after is not None and error.code is grpc.StatusCode.RESOURCE_EXHAUSTED and self._overloads > 0:
            pause = max(error.retry_after, FIRST_PAUSE_S) * random.uniform(1.0, 1.2)
            if self._deadline is not None and self._deadline <= now + pause:
                raise error
            self._overloads -= 1
            return Wait(pause)
        if not self._lost(error) or not (met or error.reason):
            raise error
        self._lost_at, self._first = self._lost_at or now, self._first or error
        end = self._lost_at + self._seconds
        pause = self._pause * random.uniform(0.8, 1.2)
        if self._deadline is not None and self._deadline <= min(end, now + pause):
            return Wait(max(0.0, self._deadline - now), _late(self._first))
        if now + pause >= end:
            raise self._first
        self._pause = min(2 * self._pause, MOST_PAUSE_S)
        self._retries += 1
        return Wait(pause)

    def _lost(self, error: ServiceError) -> bool:
        if error.code is grpc.StatusCode.UNAVAILABLE:
            return True
        return self._retries > 0 and error.reason == IN_USE


@dataclass(frozen=True)
class Wait:
    """Seconds to sleep, and what to raise after them instead of sending the call again."""

    seconds: float
    then: ServiceError | None = None


def _late(lost: ServiceError) -> ServiceError:
    """What a call with a deadline ends with, whatever it was that took too long."""
    words = f"the server was lost and not back in time: {lost}"
    return made(grpc.StatusCode.DEADLINE_EXCEEDED, words, request_id=lost.request_id)


@dataclass
class _Received:
    """Of one sample, and how far the present attempt has come in it."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    done: bool = False
    tokens_again: int = 0
    text_again: int = 0


class Continued:
    """What is news in a stream that may begin again."""

    def __init__(self) -> None:
        self._samples: dict[tuple[int, int], _Received] = {}
        self._seeds: dict[int, tuple[int, bool]] = {}  # by prompt: the seed used, and whether nothing is drawn
        self._scored: set[int] = set()
        self._failed: set[int] = set()
        self._lost: ServiceError | None = None

    def begin_again(self, lost: ServiceError) -> None:
        self._lost = lost
        for sample in self._samples.values():
            sample.tokens_again = sample.text_again = 0

    def news(self, chunk: inference.GenerateChunk) -> inference.GenerateChunk | None:
        """The chunk without what was received before; None where that was all."""
        sample = self._samples.setdefault((chunk.prompt_index, chunk.sample_index), _Received())
        fresh = self._prompt_news(chunk)
        tokens = self._token_news(chunk, sample)
        text = self._text_news(chunk, sample)
        ended = chunk.finish_reason != inference.FINISH_REASON_UNSPECIFIED and not sample.done
        if ended and sample.tokens_again < len(sample.token_ids):
            raise self._another("fewer tokens than were received")
        sample.done |= ended
        return chunk if fresh or tokens or text or ended or self._lost is None else None

    def _prompt_news(self, chunk: inference.GenerateChunk) -> bool:
        """What is said of a prompt once."""
        index, fresh = chunk.prompt_index, False
        if chunk.HasField("prompt"):
            used = chunk.prompt.used.sampling
            given = used.seed, used.temperature == 0 or used.HasField("beam")
            known = self._seeds.setdefault(index, given)
            if known is not given:
                if known != given and not (known[1] and given[1]):
                    raise self._another(f"seed {given[0]} where it was {known[0]}")
                chunk.ClearField("prompt")
            else:
                fresh = True
        for name, seen, said in (
            ("prompt_logprobs", self._scored, bool(chunk.prompt_logprobs)),
            ("status", self._failed, chunk.HasField("status")),
        ):
            if said and index in seen:
                chunk.ClearField(name)
            elif said:
                seen.add(index)
                fresh = True
        return fresh

    def _token_news(self, chunk: inference.GenerateChunk, sample: _Received) -> bool:
        again = min(len(chunk.token_ids), len(sample.token_ids) - sample.tokens_again)
        before = sample.token_ids[sample.tokens_again : sample.tokens_again + again]
        if list(chunk.token_ids[:again]) != before:
            raise self._another("other tokens than those received")
        sample.tokens_again += len(chunk.token_ids)
        for name in PER_TOKEN if again else ():
            del getattr(chunk, name)[:again]
        sample.token_ids += chunk.token_ids
        return bool(chunk.token_ids)

    def _text_news(self, chunk: inference.GenerateChunk, sample: _Received) -> bool:
        again = min(len(chunk.text), len(sample.text) - sample.text_again)
        if chunk.text[:again] != sample.text[sample.text_again : sample.text_again + again]:
            raise self._another("another text than that received")
        sample.text_again += len(chunk.text)
        chunk.text = chunk.text[again:]
        sample.text += chunk.text
        return bool(chunk.text)

    def _another(self, what: str) -> ServiceError:
        """Not the answer that was begun: what happened is raised, with the reason why it cannot be made good."""
        lost = self._lost
        assert lost is not None, "an answer can only differ from one before it"
        advice = f"the answer to the retry has {what}: give sampling.seed, or the server a state_dir, so that a stream "
        advice += "can go on"
        return made(lost.code, lost.words or str(lost), lost.details, advice, lost.request_id)
