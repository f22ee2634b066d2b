"""The front-end's answers to response messages. Nothing is decided here."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence

from google.protobuf.message import Message

from cluster.engine.request import FinishReason, SamplingParams, StoppingCriteria, Timings, TokenLogprobs
from cluster.frontend.output.output_text import TextCodec
from cluster.frontend.output.streams import Chunk, PromptInfo, Result
from cluster.frontend.requests.call import Call
from cluster.rpc.codec.error_status import status_of
from cluster.rpc.codec.message_pieces import nested
from parallel.errors import RequestError
from tp_decoders.protocol import inference_pb2 as pb

REASONS = {
    None: pb.FINISH_REASON_UNSPECIFIED,
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.ABORTED: pb.FINISH_REASON_ABORTED,
    FinishReason.DEADLINE: pb.FINISH_REASON_DEADLINE,
    FinishReason.ERROR: pb.FINISH_REASON_ERROR,
}

EARLY_STOPPING: dict[bool | str, pb.EarlyStopping] = {
    False: pb.EARLY_STOPPING_FALSE,
    True: pb.EARLY_STOPPING_TRUE,
    "never": pb.EARLY_STOPPING_NEVER,
}


PIECE = 2048
"""Messages of alternatives that are made in one go: a few milliseconds."""
SMALL = 16
"""What a small message counts beside them."""


class Encoder:
    """Encodes the answers to one call: what was asked for, and nothing else."""

    def __init__(self, call: Call, request_id: str, codec: TextCodec | None) -> None:
        self._response = call.response
        self._request_id = request_id
        self._codec = codec
        self._made = 0

    async def chunk(self, chunk: Chunk) -> pb.GenerateChunk:
        """Of a stream; one with very many alternatives in pieces, as a whole answer is."""
        message = pb.GenerateChunk(
            prompt_index=chunk.prompt_index,
            sample_index=chunk.sample_index,
            text=chunk.text,
            token_ids=chunk.token_ids,
            finish_reason=REASONS[chunk.finish_reason],
            weight_version=chunk.weight_version,
            stop_sequence=chunk.stop_sequence or "",
            stop_token_id=chunk.stop_token_id,
        )
        self._add_tokens(message, chunk)
        for entry in chunk.logprobs if self._response.logprobs else ():
            message.top_logprobs.append(_top(entry))
            await self._breathe(len(entry.top))
        for entry in chunk.prompt_logprobs or ():
            message.prompt_logprobs.append(_token_logprob(entry))
            await self._breathe(len(entry.top))
        if chunk.score is not None:
            message.score = chunk.score
        if chunk.prompt is not None:
            message.prompt.CopyFrom(self._prompt(chunk.prompt))
        if chunk.error is not None:
            message.status.CopyFrom(status_of(chunk.error))
            message.finish_reason = pb.FINISH_REASON_ERROR
        return message

    async def response(self, results: Sequence[Result]) -> bytes:
        """In pieces, between which the event loop does what others wait for."""
        parts = [pb.GenerateResponse(request_id=self._request_id).SerializeToString()]
        for result in results:
            parts.append(nested(pb.GenerateResponse.RESULTS_FIELD_NUMBER, await self._result(result)))
        return b"".join(parts)

    async def scores(self, results: Sequence[Result]) -> bytes:
        """In pieces as well."""
        parts = [pb.ScoreResponse(request_id=self._request_id).SerializeToString()]
        for result in results:
            parts.append(nested(pb.ScoreResponse.RESULTS_FIELD_NUMBER, await self._score(result)))
        return b"".join(parts)

    async def _breathe(self, made: int) -> None:
        """Lets others have the loop once so many messages of alternatives were made."""
        self._made += 1 + made
        if self._made > PIECE:
            self._made = 0
            await asyncio.sleep(0)

    async def _result(self, result: Result) -> list[bytes]:
        message = pb.GenerateResult(prompt_index=result.prompt_index, status=status_of(result.error))
        if result.prompt is not None:
            info = self._prompt(result.prompt)
            message.prompt_tokens = info.prompt_tokens
            message.prompt_token_ids.extend(info.prompt_token_ids)
            message.used.CopyFrom(info.used)
            await self._breathe(SMALL + len(info.prompt_token_ids) // 16)
        parts = [message.SerializeToString()]
        for _, chunk in sorted(result.samples.items()):
            if chunk.token_ids or chunk.finish_reason is not None:
                parts.append(nested(pb.GenerateResult.SAMPLES_FIELD_NUMBER, await self._sample(chunk)))
        some = result.prompt_logprobs or ()
        return [*parts, *await self._pieces(pb.GenerateResult, "prompt_logprobs", _token_logprob, some)]

    async def _sample(self, chunk: Chunk) -> list[bytes]:
        message = pb.Sample(
            index=chunk.sample_index,
            text=chunk.text,
            token_ids=chunk.token_ids,
            finish_reason=REASONS[chunk.finish_reason],
            weight_version=chunk.weight_version,
            stop_sequence=chunk.stop_sequence or "",
            stop_token_id=chunk.stop_token_id,
            score=chunk.score,
        )
        self._add_tokens(message, chunk)
        await self._breathe(SMALL + len(chunk.token_ids) // 16)
        some = chunk.logprobs if self._response.logprobs else ()
        return [message.SerializeToString(), *await self._pieces(pb.Sample, "top_logprobs", _top, some)]

    async def _pieces(
        self,
        kind: type[Message],
        field: str,
        make: Callable[[TokenLogprobs], Message],
        entries: Sequence[TokenLogprobs],
    ) -> list[bytes]:
        """A list of alternatives, as parts of the message that it is in."""
        step = max(1, PIECE // (1 + max((len(entry.top) for entry in entries), default=0)))
        found = []
        for first in range(0, len(entries), step):
            found.append(kind(**{field: map(make, entries[first : first + step])}).SerializeToString())
            await self._breathe(PIECE)
        return found

    def _add_tokens(self, message: pb.GenerateChunk | pb.Sample, chunk: Chunk) -> None:
        """What was asked for beside the tokens themselves, but for alternatives."""
        if self._response.logprobs is not None:
            message.logprobs.extend(entry.logprob for entry in chunk.logprobs)
        if self._response.token_bytes and self._codec is not None:
            message.token_bytes.extend(map(self._codec.tokenizer.token_bytes, chunk.token_ids))
        if self._response.timings and chunk.timings is not None:
            message.timings.CopyFrom(_timings(chunk.timings))

    def _prompt(self, info: PromptInfo) -> pb.PromptInfo:
        used = pb.UsedParameters(sampling=_sampling(info.sampling), stopping=_stopping(info.stopping))
        ids = info.token_ids
        return pb.PromptInfo(
            request_id=self._request_id,
            prompt_tokens=info.num_tokens,
            prompt_token_ids=ids,
            used=used,
            has_text=self._codec is not None,
        )

    async def _score(self, result: Result) -> list[bytes]:
        entries = result.prompt_logprobs or ()
        message = pb.ScoreResult(
            sequence_index=result.prompt_index,
            status=status_of(result.error),
            token_ids=result.prompt.token_ids if result.prompt is not None else (),
            logprobs=[entry.logprob for entry in entries],
            weight_version=max((chunk.weight_version for chunk in result.samples.values()), default=0),
        )
        await self._breathe(SMALL + len(entries) // 16)
        some = entries if self._response.prompt_logprobs else ()
        parts = [message.SerializeToString(), *await self._pieces(pb.ScoreResult, "top_logprobs", _top, some)]
        result.prompt_logprobs = None  # an answer may be large: never whole in two forms
        return parts


def token_lists(sequences: Sequence[Sequence[int]]) -> Iterator[pb.TokenizeResponse]:
    """A part for each."""
    return (pb.TokenizeResponse(results=[pb.TokenIds(ids=ids)]) for ids in sequences)


def texts(items: Sequence[str | RequestError]) -> Iterator[pb.DetokenizeResponse]:
    """A part for each."""
    for item in items:
        text, error = (item, None) if isinstance(item, str) else ("", item)
        yield pb.DetokenizeResponse(results=[pb.DetokenizeResult(status=status_of(error), text=text)])


def _sampling(given: SamplingParams) -> pb.SamplingParams:
    names = ("temperature", "top_k", "top_p", "min_p", "seed", "n", "repetition_penalty", "presence_penalty")
    used = pb.SamplingParams(
        frequency_penalty=given.frequency_penalty,
        no_repeat_ngram_size=given.no_repeat_ngram_size,
        best_of=given.best_of,
        no_speculation=given.no_speculation,
        **{name: getattr(given, name) for name in names},
    )
    if (beam := given.beam) is not None:
        used.beam.CopyFrom(
            pb.Beam(
                width=beam.width,
                length_penalty=beam.length_penalty,
                early_stopping=EARLY_STOPPING[beam.early_stopping],
                groups=beam.groups,
                diversity_penalty=beam.diversity_penalty,
            )
        )
    return used


def _stopping(given: StoppingCriteria) -> pb.StoppingCriteria:
    names = ("max_new_tokens", "min_new_tokens", "ignore_eos", "include_stop_sequence")
    return pb.StoppingCriteria(**{name: getattr(given, name) for name in names})


def _timings(given: Timings) -> pb.Timings:
    return pb.Timings(queued=given.queued, first_token=given.first_token, total=given.total)


def _token_logprob(entry: TokenLogprobs) -> pb.TokenLogprob:
    return pb.TokenLogprob(token_id=entry.token_id, logprob=entry.logprob, top=_top(entry).tokens)


def _top(entry: TokenLogprobs) -> pb.TopLogprobs:
    return pb.TopLogprobs(tokens=[pb.TopLogprob(token_id=token, logprob=value) for token, value in entry.top])
