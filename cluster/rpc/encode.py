"""The front-end's answers to response messages. Nothing is decided here."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from cluster.engine.request import FinishReason, SamplingParams, StoppingCriteria, Timings, TokenLogprobs
from cluster.frontend.calls import Call
from cluster.frontend.streams import Chunk, PromptInfo, Result
from cluster.frontend.text import TextCodec
from cluster.rpc.errors import status_of
from cluster.rpc.proto import inference_pb2 as pb
from parallel.errors import RequestError

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


class Encoder:
    """Encodes the answers to one call: what was asked for, and nothing else."""

    def __init__(self, call: Call, request_id: str, codec: TextCodec | None) -> None:
        self._response = call.response
        self._request_id = request_id
        self._codec = codec
        self._made = 0

    def chunk(self, chunk: Chunk) -> pb.GenerateChunk:
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
        if chunk.score is not None:
            message.score = chunk.score
        if chunk.prompt_logprobs is not None:
            message.prompt_logprobs.extend(map(_token_logprob, chunk.prompt_logprobs))
        if chunk.prompt is not None:
            message.prompt.CopyFrom(self._prompt(chunk.prompt))
        if chunk.error is not None:
            message.status.CopyFrom(status_of(chunk.error))
            message.finish_reason = pb.FINISH_REASON_ERROR
        return message

    async def response(self, results: Sequence[Result]) -> pb.GenerateResponse:
        """In pieces, between which the event loop does what others wait for."""
        message = pb.GenerateResponse(request_id=self._request_id)
        for result in results:
            message.results.append(await self._result(result))
        return message

    async def scores(self, results: Sequence[Result]) -> pb.ScoreResponse:
        """In pieces as well."""
        message = pb.ScoreResponse(request_id=self._request_id)
        for result in results:
            await self._score(result, message.results.add())
        return message

    async def _breathe(self, made: int) -> None:
        """Lets others have the loop once so many messages of alternatives were made."""
        self._made += 1 + made
        if self._made > PIECE:
            self._made = 0
            await asyncio.sleep(0)

    async def _result(self, result: Result) -> pb.GenerateResult:
        message = pb.GenerateResult(prompt_index=result.prompt_index, status=status_of(result.error))
        if result.prompt is not None:
            info = self._prompt(result.prompt)
            message.prompt_tokens = info.prompt_tokens
            message.prompt_token_ids.extend(info.prompt_token_ids)
            message.used.CopyFrom(info.used)
        for _, chunk in sorted(result.samples.items()):
            if chunk.token_ids or chunk.finish_reason is not None:
                message.samples.append(await self._sample(chunk))
        for entry in result.prompt_logprobs or ():
            message.prompt_logprobs.append(_token_logprob(entry))
            await self._breathe(len(entry.top))
        return message

    async def _sample(self, chunk: Chunk) -> pb.Sample:
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
        self._add_tokens(message, chunk, alternatives=False)
        for entry in chunk.logprobs if self._response.logprobs else ():
            message.top_logprobs.append(_top(entry))
            await self._breathe(len(entry.top))
        await self._breathe(len(chunk.token_ids) // 16)
        return message

    def _add_tokens(self, message: pb.GenerateChunk | pb.Sample, chunk: Chunk, alternatives: bool = True) -> None:
        """What was asked for beside the tokens themselves."""
        if self._response.logprobs is not None:
            message.logprobs.extend(entry.logprob for entry in chunk.logprobs)
        if self._response.logprobs and alternatives:
            message.top_logprobs.extend(map(_top, chunk.logprobs))
        if self._response.token_bytes and self._codec is not None:
            message.token_bytes.extend(map(self._codec.tokenizer.token_bytes, chunk.token_ids))
        if self._response.timings and chunk.timings is not None:
            message.timings.CopyFrom(_timings(chunk.timings))

    def _prompt(self, info: PromptInfo) -> pb.PromptInfo:
        used = pb.UsedParameters(sampling=_sampling(info.sampling), stopping=_stopping(info.stopping))
        ids = info.token_ids
        return pb.PromptInfo(
            request_id=self._request_id, prompt_tokens=info.num_tokens, prompt_token_ids=ids, used=used
        )

    async def _score(self, result: Result, message: pb.ScoreResult) -> None:
        message.sequence_index = result.prompt_index
        message.status.CopyFrom(status_of(result.error))
        if result.prompt is not None:
            message.token_ids.extend(result.prompt.token_ids)
        for entry in result.prompt_logprobs or ():
            message.logprobs.append(entry.logprob)
            if self._response.prompt_logprobs:
                message.top_logprobs.append(_top(entry))
            await self._breathe(len(entry.top))
        message.weight_version = max((chunk.weight_version for chunk in result.samples.values()), default=0)
        result.prompt_logprobs = None  # an answer may be large: never whole in two forms


def token_lists(sequences: Sequence[Sequence[int]]) -> pb.TokenizeResponse:
    return pb.TokenizeResponse(results=[pb.TokenIds(ids=ids) for ids in sequences])


def texts(items: Sequence[str | RequestError]) -> pb.DetokenizeResponse:
    results = (
        pb.DetokenizeResult(status=status_of(None), text=item)
        if isinstance(item, str)
        else pb.DetokenizeResult(status=status_of(item))
        for item in items
    )
    return pb.DetokenizeResponse(results=results)


def _sampling(given: SamplingParams) -> pb.SamplingParams:
    names = ("temperature", "top_k", "top_p", "min_p", "seed", "n", "repetition_penalty", "presence_penalty")
    used = pb.SamplingParams(
        frequency_penalty=given.frequency_penalty,
        no_repeat_ngram_size=given.no_repeat_ngram_size,
        best_of=given.best_of,
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
