"""Request messages to the front-end's calls. Total: every message becomes a call, or the error that says what is wrong.

Unset fields become None or the default; rules about values are the front-end's. Lists are measured before they are
copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeVar

from google.protobuf.message import Message

from cluster.engine.guided.grammar import choice_guide
from cluster.engine.request import BeamParams, Guide, Pooling, ResponseOptions, SamplingParams, StoppingCriteria
from cluster.frontend.requests.call import Call, FillInMiddle, FrontendConfig, Prompt
from cluster.frontend.requests.classify_embed import MAX_ANSWER_TOKENS, Reading
from cluster.request_errors import InvalidRequest, NotImplementedField, Violation
from tp_decoders.protocol import inference_pb2 as pb

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


def classify_call(message: pb.ClassifyRequest, config: FrontendConfig, deadline: float | None) -> Call:
    """What a ClassifyRequest asks for."""
    reading = Reading(
        num_choices=message.num_choices,
        marks=_bounded(message.marks, "marks", config.max_prompts_per_call),
        num_spans=_given(message, "num_spans", 1),
        max_answer_tokens=_given(message, "max_answer_tokens", MAX_ANSWER_TOKENS),
    )
    return _reading_call(message, reading, config, deadline)


def embed_call(message: pb.EmbedRequest, config: FrontendConfig, deadline: float | None) -> Call:
    """What an EmbedRequest asks for."""
    if message.pooling not in (pb.POOLING_UNSPECIFIED, pb.POOLING_LAST, pb.POOLING_MEAN):
        raise InvalidRequest.of([Violation("pooling", f"{message.pooling} is unknown; give LAST or MEAN")])
    rows: Literal["last", "mean"] = "mean" if message.pooling == pb.POOLING_MEAN else "last"
    pooling = Pooling(rows=rows, head=False, normalize=message.normalize)
    return _reading_call(message, Reading(pooling=pooling), config, deadline)


def _reading_call(
    message: pb.ClassifyRequest | pb.EmbedRequest, reading: Reading, config: FrontendConfig, deadline: float | None
) -> Call:
    return Call(
        prompts=_prompts(message.sequences, "sequences", config),
        request_id=message.request_id,
        priority=message.priority,
        deadline=_deadline(deadline),
        reading=reading,
    )


def _prompts(messages: Sequence[pb.Prompt], field: str, config: FrontendConfig) -> tuple[Prompt, ...]:
    return tuple(map(_prompt, _bounded(messages, field, config.max_prompts_per_call)))


def _prompt(message: pb.Prompt) -> Prompt:
    """A prompt that says nothing stays so: it fails alone, at admission."""
    kind = message.WhichOneof("prompt")
    if kind == "fim":
        if message.fim.order not in (pb.FIM_PREFIX_FIRST, pb.FIM_SUFFIX_FIRST):
            raise InvalidRequest.of([Violation("fim.order", f"{message.fim.order} is none of the orders there are")])
        first = message.fim.order == pb.FIM_SUFFIX_FIRST
        return Prompt(fim=FillInMiddle(message.fim.prefix, message.fim.suffix, suffix_first=first))
    if kind == "text":
        return Prompt(text=message.text)
    return Prompt(token_ids=message.token_ids.ids if kind == "token_ids" else None)


def _sampling(message: pb.SamplingParams, config: FrontendConfig) -> SamplingParams:
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
        no_repeat_ngram_size=message.no_repeat_ngram_size,
        best_of=_given(message, "best_of", None),
        beam=_beam(message.beam) if message.HasField("beam") else None,
        no_speculation=message.no_speculation,
        guide=_guide(message.structured_outputs) if message.HasField("structured_outputs") else None,
    )


def _guide(message: pb.StructuredOutputs) -> Guide:
    kind = message.WhichOneof("guide")
    if kind is None or (kind == "json_object" and not message.json_object):
        given = "none given; give one of json, json_object (true), regex, choice and grammar"
        raise InvalidRequest.of([Violation("sampling.structured_outputs", given)])
    blanks = not message.disable_any_whitespace
    if kind == "json":
        return Guide(kind="json", text=message.json, any_whitespace=blanks)
    if kind == "json_object":
        return Guide(kind="json_object", any_whitespace=blanks)
    if kind == "choice":
        return choice_guide(message.choice.texts)
    return Guide(kind="regex", text=message.regex) if kind == "regex" else Guide(kind="grammar", text=message.grammar)


EARLY_STOPPING: dict[int, bool | Literal["never"]] = {
    pb.EARLY_STOPPING_FALSE: False,
    pb.EARLY_STOPPING_TRUE: True,
    pb.EARLY_STOPPING_NEVER: "never",
}


def _beam(message: pb.Beam) -> BeamParams:
    if message.early_stopping not in EARLY_STOPPING:
        wrong = f"{message.early_stopping} is none of the values there are"
        raise InvalidRequest.of([Violation("sampling.beam.early_stopping", wrong)])
    return BeamParams(
        width=message.width,
        length_penalty=_given(message, "length_penalty", 1.0),
        early_stopping=EARLY_STOPPING[message.early_stopping],
        groups=message.groups or 1,
        diversity_penalty=message.diversity_penalty,
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
