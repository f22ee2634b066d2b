"""A stream's server-sent events. What stays the same in all chunks of a call is rendered once and spliced: a chunk
costs the escaping of its own text.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from cluster.frontend.output.output_text import TextCodec
from cluster.frontend.output.streams import Chunk
from cluster.http.replies.answers import REASONS, Heading, Tokens, stop_reason, usage_of
from cluster.http.replies.token_texts import TokenTexts
from cluster.http.requests.asked import Asked, Streaming

DONE = b"data: [DONE]\n\n"
CHAT, TEXT = "chat.completion.chunk", "text_completion"
_escaped = json.JSONEncoder(ensure_ascii=False).encode


class Events:
    """Makes the events of one call, in order."""

    def __init__(self, asked: Asked, heading: Heading, codec: TextCodec | None, chat: bool) -> None:
        self._asked, self._heading, self._chat = asked, heading, chat
        self._streaming = asked.streaming or Streaming(usage=False, usage_always=False)
        self._texts = TokenTexts(codec, asked.names_are_ids)
        shared = _escaped(heading.fields(CHAT if chat else TEXT))[:-1]
        self._start = f'data: {shared}, "choices": [{{"index": '
        self._last = f'data: {shared}, "choices": []'
        self._ends: dict[int, str] = {}  # by version of the weights
        self._length: Counter[int] = Counter()  # characters, by index
        self._made: Counter[int] = Counter()  # tokens, by index
        self._read: dict[int, int] = {}  # tokens, by prompt
        self._version = 0

    def of(self, chunk: Chunk) -> bytes:
        """The events of some news; none where a client would see nothing in them."""
        asked, index = self._asked, chunk.prompt_index * self._asked.call.sampling.n + chunk.sample_index
        tokens = Tokens.of(chunk, asked)
        if chunk.prompt is not None:
            self._read[chunk.prompt_index] = chunk.prompt.num_tokens
        first = index not in self._made
        self._made[index] += len(tokens.ids)
        self._version = max(self._version, chunk.weight_version)
        told = asked.logprobs is not None or asked.token_ids
        if not (chunk.text or chunk.finish_reason or (told and tokens.ids)):
            return b""
        head = self._event(index, '"delta": {"role": "assistant", "content": ""}') if self._chat and first else ""
        more = self._told(index, chunk, tokens, first)
        text = _escaped(chunk.text)
        self._length[index] += len(chunk.text)
        body = f'"delta": {{"content": {text}}}' if self._chat else f'"text": {text}'
        ending = None if chunk.finish_reason is None else REASONS[chunk.finish_reason]
        return (head + self._event(index, body, more, ending, chunk)).encode("utf-8", "replace")

    def end(self) -> bytes:
        """The usage where it was asked for, and the last line."""
        if not self._streaming.usage:
            return DONE
        return f"{self._last}{self._end()}, {self._usage(None)}}}\n\n".encode() + DONE

    @staticmethod
    def error(body: dict[str, Any]) -> bytes:
        """What went wrong after the first byte."""
        return b"data: " + json.dumps(body).encode() + b"\n\n" + DONE

    def _event(
        self,
        index: int,
        body: str,
        more: str = '"logprobs": null',
        ending: str | None = None,
        chunk: Chunk | None = None,
    ) -> str:
        reason = "null" if ending is None else f'"{ending}"'
        if chunk is not None and ending is not None:
            reason += f', "stop_reason": {_escaped(stop_reason(chunk, self._asked))}'
        usage = f", {self._usage(index)}" if self._streaming.usage_always else ""
        return f'{self._start}{index}, {body}, {more}, "finish_reason": {reason}}}]{self._end()}{usage}}}\n\n'

    def _end(self) -> str:
        if self._version not in self._ends:
            fingerprint = _escaped(self._heading.system_fingerprint(self._version))
            self._ends[self._version] = f', "system_fingerprint": {fingerprint}'
        return self._ends[self._version]

    def _usage(self, index: int | None) -> str:
        """Of the whole call, or so far of one sample."""
        if index is None:
            counts = usage_of(sum(self._read.values()), self._made.total())
        else:
            counts = usage_of(self._read.get(index // self._asked.call.sampling.n, 0), self._made[index])
        return f'"usage": {_escaped(counts)}'

    def _told(self, index: int, chunk: Chunk, tokens: Tokens, first: bool) -> str:
        """Log-probabilities and ids, where asked for."""
        asked, logprobs = self._asked, "null"
        if asked.logprobs is not None and tokens.entries:
            at = self._length[index]
            texts = self._texts
            logprobs = _escaped(
                texts.chat(tokens.entries) if self._chat else texts.legacy(tokens.ids, tokens.entries, at)
            )
        if not asked.token_ids:
            return f'"logprobs": {logprobs}'
        prompt = asked.call.prompts[chunk.prompt_index].token_ids if first else None
        ids = f'"token_ids": {tokens.ids}, "prompt_token_ids": {"null" if prompt is None else list(prompt)}'
        return f'"logprobs": {logprobs}, {ids}'
