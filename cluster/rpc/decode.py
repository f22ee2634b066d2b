"""Request messages to the front-end's calls. Total: every message becomes a call, or the error that says what is wrong.

Unset fields become None or the default; rules about values are the front-end's. Lists are measured before they are
copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from google.protobuf.message import Message

from cluster.engine.request import ResponseOptions, SamplingParams, StoppingCriteria
from cluster.frontend.calls import Call, FillInMiddle, FrontendConfig, Prompt
from cluster.frontend.errors import InvalidRequest, NotImplementedField, Violation
from cluster.rpc.proto import inference_pb2 as pb

T = TypeVar("T")
D = TypeVar("D")

ADAPTERS = "adapters are not served by this version; leave it empty"


def generate_call(message: pb.GenerateRequest, config: FrontendConfig, deadline: float | None) -> Call:
    """What a GenerateRequest asks for."""
    if message.adapter:
        raise NotImplementedField.of("adapter", ADAPTERS)
    sampling = _sampling(message.sampling, config)
    return Call(
        prompts=_prompts(message.prompts, "prompts", config),
        request_id=message.request_id,
        sampling=sampling,
        stopping=_stopping(message.stopping, config),
        response=_response(message.response),
        bad_words=_bounded(message.sampling.bad_words, "sampling.bad_words", config.max_bad_words),
        priority=message.priority,
        deadline=_deadline(deadline),
    )


def score_call(message: pb.ScoreRequest, config: FrontendConfig, deadline: float | None) -> Call:
    """What a ScoreRequest asks for."""
    if message.adapter:
        raise NotImplementedField.of("adapter", ADAPTERS)
    response = ResponseOptions(
        prompt_logprobs=message.top_logprobs,
        logprobs_temperature=_given(message, "temperature", 1.0),
    )
    return Call(
        prompts=_prompts(message.sequences, "sequences", config),
        request_id=message.request_id,
        response=response,
        priority=message.priority,
        deadline=_deadline(deadline),
        score=True,
    )


def _prompts(messages: Sequence[pb.Prompt], field: str, config: FrontendConfig) -> tuple[Prompt, ...]:
    return tuple(map(_prompt, _bounded(messages, field, config.max_prompts_per_call)))


def _prompt(message: pb.Prompt) -> Prompt:
    """A prompt that says nothing stays so: it fails alone, at admission."""
    kind = message.WhichOneof("prompt")
    if kind == "fim":
        return Prompt(fim=FillInMiddle(message.fim.prefix, message.fim.suffix))
    if kind == "text":
        return Prompt(text=message.text)
    return Prompt(token_ids=message.token_ids.ids if kind == "token_ids" else None)


def _sampling(message: pb.SamplingParams, config: FrontendConfig) -> SamplingParams:
    if message.HasField("beam"):
        raise NotImplementedField.of("sampling.beam", "leave it out; sampling.n gives several independent samples")
    ids = config.max_id_list
    words = _bounded(message.bad_word_ids, "sampling.bad_word_ids", config.max_bad_words)
    return SamplingParams(
        temperature=_given(message, "temperature", 1.0),
        top_k=_given(message, "top_k", None),
        top_p=_given(message, "top_p", None),
        min_p=_given(message, "min_p", None),
        seed=_given(message, "seed", None),
        n=_given(message, "n", 1),
        repetition_penalty=_given(message, "repetition_penalty", 1.0),
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        logit_bias=dict(message.logit_bias) if _count("sampling.logit_bias", len(message.logit_bias), ids) else {},
        allowed_token_ids=_bounded(message.allowed_token_ids, "sampling.allowed_token_ids", ids) or None,
        bad_words=tuple(_bounded(word.ids, "sampling.bad_word_ids", config.max_stop_length) for word in words),
    )


def _stopping(message: pb.StoppingCriteria, config: FrontendConfig) -> StoppingCriteria:
    return StoppingCriteria(
        max_new_tokens=_given(message, "max_new_tokens", None),
        min_new_tokens=message.min_new_tokens,
        stop_sequences=_bounded(message.stop_sequences, "stopping.stop_sequences", config.max_stop_sequences),
        stop_token_ids=_bounded(message.stop_token_ids, "stopping.stop_token_ids", config.max_id_list),
        ignore_eos=message.ignore_eos,
        include_stop_sequence=message.include_stop_sequence,
    )


def _response(message: pb.ResponseOptions) -> ResponseOptions:
    return ResponseOptions(
        logprobs=_given(message, "logprobs", None),
        prompt_logprobs=_given(message, "prompt_logprobs", None),
        logprobs_temperature=_given(message, "logprobs_temperature", 1.0),
        token_bytes=message.token_bytes,
        echo=message.echo,
        timings=message.timings,
    )


def _given(message: Message, field: str, default: D) -> D:
    """An `optional` field's value, or the default where it was not sent."""
    return getattr(message, field) if message.HasField(field) else default


def _deadline(remaining: float | None) -> float | None:
    """gRPC's own, unless it is so far that it means none."""
    return None if remaining is None or remaining > 1e8 else max(remaining, 1e-3)


def _bounded(items: Sequence[T], field: str, most: int) -> tuple[T, ...]:
    return tuple(items) if _count(field, len(items), most) else ()


def _count(field: str, count: int, most: int) -> int:
    if count > most:
        raise InvalidRequest.of([Violation(field, f"{count} entries; at most {most} are allowed")])
    return count
