"""What a request for text asks for: the front-end's call, and how its answer is to be told.

The parts that /v1/completions and /v1/chat/completions have in common, under vLLM's names. Values are not judged here:
their rules are the front-end's, the same as for gRPC.
"""

from __future__ import annotations

from dataclasses import dataclass

from cluster.engine.request import BeamParams, SamplingParams, StoppingCriteria
from cluster.frontend.requests.call import Call
from cluster.http.requests.json_body import Fields, invalid

IGNORED = frozenset(
    {"user", "service_tier", "store", "metadata", "parallel_tool_calls", "reasoning_effort", "tool_choice", "model",
     "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "verbosity", "spaces_between_special_tokens"}
)  # fmt: skip
"""Sent by tools, without a meaning here and without a warning."""
REFUSED = {
    "structured_outputs": "guided decoding is not served", "guided_json": "guided decoding is not served",
    "guided_regex": "guided decoding is not served", "guided_choice": "guided decoding is not served",
    "guided_grammar": "guided decoding is not served", "tools": "tools are not served",
    "functions": "tools are not served", "truncate_prompt_tokens": "prompts are never cut; send a shorter one",
    "cache_salt": "the prefix cache has no salt", "prompt_embeds": "embeddings are no prompt here",
    "audio": "there is only text", "kv_transfer_params": "caches are not sent",
}  # fmt: skip
"""Known fields that would change the answer and cannot be honoured."""


@dataclass(frozen=True)
class Streaming:
    """What a stream tells of the tokens that were used."""

    usage: bool  # at its end
    usage_always: bool  # in every chunk


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A call, and what of its answer is told how."""

    call: Call
    model: str | None
    streaming: Streaming | None
    echo: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    token_ids: bool = False
    names_are_ids: bool = False  # tokens are written token_id:17
    texts: tuple[str | None, ...] = ()  # of the prompts that are to be tokenized first
    whole_texts: bool = True  # with what the tokenizer puts before every text

    @property
    def stop_included(self) -> bool:
        return self.call.stopping.include_stop_sequence


def check_refused(fields: Fields) -> None:
    """Raise for what would have to be honoured and is not."""
    for name in (name for name in REFUSED if fields.given(name)):
        raise invalid(name, f"{REFUSED[name]}; leave it out")
    form = fields.section("response_format").text("type", "text")
    if form != "text":
        raise invalid("response_format", f"{form!r} is not served; leave it out, or give text")
    if not fields.flag("skip_special_tokens", True):
        raise invalid("skip_special_tokens", "special tokens are not shown as text; ask for return_token_ids")


def streaming_of(fields: Fields) -> Streaming | None:
    """None: the answer comes whole."""
    stream, options = fields.flag("stream"), fields.section("stream_options")
    if fields.given("stream_options") and not stream:
        raise invalid("stream_options", "is only for a stream; add stream: true")
    always = options.flag("continuous_usage_stats")
    usage = options.flag("include_usage") or always
    options.ignore(frozenset({"include_obfuscation"}))
    return Streaming(usage, always) if stream else None


def sampling_of(fields: Fields) -> SamplingParams:
    """As vLLM names it; what means no cut there is no cut here."""
    top_k, min_p, n = fields.whole("top_k", None), fields.number("min_p", None), fields.whole("n", 1)
    best_of = fields.whole("best_of", None)
    beams = fields.flag("use_beam_search")
    beam = BeamParams(width=best_of or n, length_penalty=fields.number("length_penalty", 1.0)) if beams else None
    return SamplingParams(
        temperature=fields.number("temperature", 1.0),
        top_k=None if top_k in (-1, 0) else top_k,
        top_p=fields.number("top_p", None),
        min_p=min_p or None,
        seed=fields.whole("seed", None),
        n=n,
        repetition_penalty=fields.number("repetition_penalty", 1.0),
        presence_penalty=fields.number("presence_penalty", 0.0),
        frequency_penalty=fields.number("frequency_penalty", 0.0),
        logit_bias=_bias(fields),
        allowed_token_ids=fields.ids("allowed_token_ids") or None,
        best_of=None if beams or best_of in (None, n) else best_of,
        beam=beam,
    )


def stopping_of(fields: Fields, max_new_tokens: int | None) -> StoppingCriteria:
    """Empty stop strings mean nothing, as vLLM takes them."""
    return StoppingCriteria(
        max_new_tokens=max_new_tokens,
        min_new_tokens=fields.whole("min_tokens", 0),
        stop_sequences=tuple(stop for stop in fields.texts("stop") if stop),
        stop_token_ids=fields.ids("stop_token_ids"),
        ignore_eos=fields.flag("ignore_eos"),
        include_stop_sequence=fields.flag("include_stop_str_in_output"),
    )


def _bias(fields: Fields) -> dict[int, float]:
    """Keys of JSON are text."""
    bias, found = fields.section("logit_bias"), {}
    for key in bias.names():
        if not (key.isascii() and key.isdigit() and len(key) < 12):
            raise invalid("logit_bias", f"{key[:40]!r} is no token id; give whole numbers as keys")
        found[int(key)] = bias.number(key, 0.0)
    return found
