"""The front-end's results as OpenAI's whole answers. Nothing is decided here."""

from __future__ import annotations

import base64
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cluster.engine.request import FinishReason, TokenLogprobs
from cluster.engine.top_logprobs import Alternatives
from cluster.frontend.output.output_text import TextCodec
from cluster.frontend.output.streams import Chunk, Result
from cluster.http.replies.token_texts import TokenTexts
from cluster.http.requests.asked import Asked
from cluster.request_errors import ReadingEnded, RequestFailed

REASONS = {
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.ABORTED: "abort",
    FinishReason.DEADLINE: "abort",
    FinishReason.ERROR: "error",
}


@dataclass(frozen=True)
class Heading:
    """What every answer, and every chunk, of one call begins with."""

    kind: str  # cmpl or chatcmpl
    request_id: str
    model: str
    fingerprint: str
    created: int

    @classmethod
    def now(cls, kind: str, request_id: str, model: str, fingerprint: str) -> Heading:
        return cls(kind, request_id, model, fingerprint, int(time.time()))

    @property
    def id(self) -> str:
        return f"{self.kind}-{self.request_id}"

    def system_fingerprint(self, weight_version: int) -> str:
        """What the numbers depend on: the server's numerics, and the weights as trained."""
        return f"{self.fingerprint}-w{weight_version}"

    def fields(self, form: str) -> dict[str, Any]:
        return {"id": self.id, "object": form, "created": self.created, "model": self.model}


@dataclass(frozen=True)
class Tokens:
    """The tokens that count of a sample, or of news of one: with that which ended it, as vLLM counts."""

    ids: list[int]
    entries: list[TokenLogprobs]

    @classmethod
    def of(cls, chunk: Chunk, asked: Asked) -> Tokens:
        ids, entries, stop = list(chunk.token_ids), list(chunk.logprobs), chunk.stop_token_id
        if stop is not None and not asked.stop_included:
            ids.append(stop)
            if chunk.stop_logprob is not None:  # of its alternatives nothing is known but itself
                entries.append(TokenLogprobs(stop, chunk.stop_logprob, Alternatives.of([(stop, chunk.stop_logprob)])))
        return cls(ids, entries)


def stop_reason(chunk: Chunk, asked: Asked) -> str | int | None:
    """The text or the id that ended it, where the caller named it; nothing for the end of the text."""
    if chunk.stop_sequence is not None:
        return chunk.stop_sequence
    return chunk.stop_token_id if chunk.stop_token_id in asked.call.stopping.stop_token_ids else None


def usage_of(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


class Answers:
    """The answer to one call; a prompt that failed fails it."""

    def __init__(self, asked: Asked, heading: Heading, codec: TextCodec | None) -> None:
        self._asked, self._heading, self._codec = asked, heading, codec
        self._texts = TokenTexts(codec, asked.names_are_ids)

    def completion(self, results: Sequence[Result]) -> dict[str, Any]:
        choices = [
            {"index": index, **self._choice(result, chunk)}
            for result in results
            for index, chunk in self._samples(result)
        ]
        return self._whole("text_completion", choices, results)

    def chat(self, results: Sequence[Result]) -> dict[str, Any]:
        choices = [
            {"index": index, **self._reply(result, chunk)}
            for result in results
            for index, chunk in self._samples(result)
        ]
        return self._whole("chat.completion", choices, results)

    def _samples(self, result: Result) -> list[tuple[int, Chunk]]:
        if result.error is not None:
            raise result.error
        first = result.prompt_index * self._asked.call.sampling.n
        return [(first + index, chunk) for index, chunk in sorted(result.samples.items())]

    def _whole(self, form: str, choices: list[dict[str, Any]], results: Sequence[Result]) -> dict[str, Any]:
        version = max((chunk.weight_version for r in results for chunk in r.samples.values()), default=0)
        read = sum(result.prompt.num_tokens for result in results if result.prompt)
        made = sum(len(Tokens.of(chunk, self._asked).ids) for r in results for chunk in r.samples.values())
        heading, usage = self._heading, usage_of(read, made)
        fingerprint = heading.system_fingerprint(version)
        return {**heading.fields(form), "choices": choices, "usage": usage, "system_fingerprint": fingerprint}

    def _choice(self, result: Result, chunk: Chunk) -> dict[str, Any]:
        asked, tokens = self._asked, Tokens.of(chunk, self._asked)
        prompt = list(result.prompt.token_ids) if result.prompt else []
        text = self._codec.tokenizer.decode(prompt) if asked.call.score and self._codec else chunk.text
        choice: dict[str, Any] = {"text": text, "logprobs": None, **self._ending(chunk)}
        above = result.prompt_logprobs or ()
        if asked.logprobs is not None:
            ids, entries = tokens.ids, list[TokenLogprobs | None](tokens.entries)
            if asked.echo:
                ids, entries = prompt + ids, [None, *above, *entries]
            choice["logprobs"] = self._texts.legacy(ids, entries)
        if asked.prompt_logprobs is not None:
            choice["prompt_logprobs"] = self._texts.prompt(above)
        return {**choice, **self._ids(result, tokens)}

    def _reply(self, result: Result, chunk: Chunk) -> dict[str, Any]:
        tokens = Tokens.of(chunk, self._asked)
        logprobs = None if self._asked.logprobs is None else self._texts.chat(tokens.entries)
        message = {"role": "assistant", "content": chunk.text, "refusal": None}
        return {"message": message, "logprobs": logprobs, **self._ending(chunk), **self._ids(result, tokens)}

    def _ending(self, chunk: Chunk) -> dict[str, Any]:
        reason = "length" if self._asked.call.score else REASONS.get(chunk.finish_reason or FinishReason.ERROR)
        return {"finish_reason": reason, "stop_reason": stop_reason(chunk, self._asked)}

    def _ids(self, result: Result, tokens: Tokens) -> dict[str, Any]:
        if not self._asked.token_ids:
            return {}
        prompt = self._asked.call.prompts[result.prompt_index].token_ids
        return {"prompt_token_ids": list(prompt or ()), "token_ids": tokens.ids}


def embeddings(results: Sequence[Result], model: str, packed: bool) -> dict[str, Any]:
    """One vector for each input; `packed`: base64 of little-endian float32, as OpenAI's own client asks."""
    data = [
        {"object": "embedding", "index": result.prompt_index, "embedding": _vector(_row(result), packed)}
        for result in results
    ]
    read = sum(result.prompt.num_tokens for result in results if result.prompt)
    usage = {"prompt_tokens": read, "total_tokens": read}
    return {"object": "list", "data": data, "model": model, "usage": usage}


def _row(result: Result) -> Sequence[float]:
    if result.error is not None:
        raise result.error
    pooled = result.samples[0].pooled if 0 in result.samples else None
    if not pooled:
        raise ReadingEnded("the request ended before its answer was there")
    return pooled[0]


def _vector(row: Sequence[float], packed: bool) -> list[float] | str:
    return base64.b64encode(struct.pack(f"<{len(row)}f", *row)).decode() if packed else list(row)


def failed(chunk: Chunk) -> Exception | None:
    """What ended a sample of a stream that should not have."""
    if chunk.error is not None:
        return chunk.error
    if chunk.finish_reason is FinishReason.ERROR:
        return RequestFailed("the request failed; the server's log says why")
    return None
