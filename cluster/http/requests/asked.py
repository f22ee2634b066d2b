"""What a request for text asks for: the front-end's call, and how its answer is to be told.

The parts that /v1/completions and /v1/chat/completions have in common, under vLLM's names. Values are not judged here:
their rules are the front-end's, the same as for gRPC.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from cluster.engine.guided.grammar import choice_guide
from cluster.engine.request import BeamParams, Guide, SamplingParams, StoppingCriteria
from cluster.frontend.requests.call import Call
from cluster.http.requests.json_body import Fields, invalid

IGNORED = frozenset(
    {"user", "service_tier", "store", "metadata", "parallel_tool_calls", "reasoning_effort", "tool_choice", "model",
     "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "verbosity", "spaces_between_special_tokens"}
)  # fmt: skip
"""Sent by tools, without a meaning here and without a warning."""
REFUSED = {
    "guided_json": "is now structured_outputs: {json}", "guided_regex": "is now structured_outputs: {regex}",
    "guided_choice": "is now structured_outputs: {choice}", "guided_grammar": "is now structured_outputs: {grammar}",
    "guided_decoding_backend": "there is one, llguidance", "tools": "tools are not served",
    "functions": "tools are not served", "truncate_prompt_tokens": "prompts are never cut; send a shorter one",
    "cache_salt": "the prefix cache has no salt", "prompt_embeds": "embeddings are no prompt here",
    "audio": "there is only text", "kv_transfer_params": "caches are not sent",
}  # fmt: skip
"""Known fields that would change the answer and cannot be honoured."""
GUIDES = ("json", "regex", "choice", "grammar", "json_object")
NO_GUIDES = {"structural_tag": "structural tags are not served", "whitespace_pattern": "blanks are bounded, or "
            "disable_any_whitespace leaves them out"}  # fmt: skip
VLLM_BACKENDS = frozenset({"disable_fallback", "disable_additional_properties"})
"""vLLM's, about its own backends."""


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
        guide=guide_of(fields),
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


def guide_of(fields: Fields) -> Guide | None:
    """The grammar that an answer must follow, as OpenAI (response_format) or vLLM (structured_outputs) has it."""
    asked, formed = _structured(fields), _formed(fields)
    if asked is not None and formed is not None:
        raise invalid("structured_outputs", "is given beside response_format; give one of them")
    return formed if asked is None else asked


def _formed(fields: Fields) -> Guide | None:
    form = fields.section("response_format")
    kind = form.text("type", "text")
    if kind == "text":
        return None
    if kind == "json_object":
        return Guide(kind="json_object")
    if kind != "json_schema":
        raise invalid("response_format", f"{kind[:40]!r} is not served; give text, json_object or json_schema")
    schema = form.section("json_schema").any("schema")
    if schema is None:
        raise invalid("response_format.json_schema", "has no schema; give {name, schema}")
    return Guide(kind="json", text=_schema(schema, "response_format.json_schema.schema"))


def _structured(fields: Fields) -> Guide | None:
    given = fields.section("structured_outputs")
    if not given.names():
        return None
    for name in (name for name in NO_GUIDES if given.given(name)):
        raise invalid(f"structured_outputs.{name}", f"{NO_GUIDES[name]}; leave it out")
    kinds = [name for name in GUIDES if given.any(name) not in (None, False)]
    if len(kinds) != 1:
        raise invalid("structured_outputs", f"holds {kinds or 'none'}; give one of {', '.join(GUIDES)}")
    blanks = not given.flag("disable_any_whitespace")
    given.ignore(VLLM_BACKENDS)
    if kinds == ["json"]:
        return Guide(kind="json", text=_schema(given.any("json"), "structured_outputs.json"), any_whitespace=blanks)
    if kinds == ["json_object"]:
        given.flag("json_object")
        return Guide(kind="json_object", any_whitespace=blanks)
    if kinds == ["choice"]:
        return choice_guide(given.texts("choice"))
    text = given.text(kinds[0], "")
    return Guide(kind="regex", text=text) if kinds == ["regex"] else Guide(kind="grammar", text=text)


def _schema(given: object, field: str) -> str:
    """A schema comes as an object, as true or false, or as the text of one."""
    if isinstance(given, str):
        return given
    if not isinstance(given, dict | bool):
        raise invalid(field, "is no JSON schema; give an object")
    return json.dumps(given, ensure_ascii=False)
