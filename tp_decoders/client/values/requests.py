"""Messages from plain values: each field is set by itself, so that an error names it before anything is sent."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from typing import Any, Literal, TypedDict, TypeVar

from google.protobuf.message import Message

from tp_decoders.access.errors import SettingsError
from tp_decoders.protocol import inference_pb2 as inference

M = TypeVar("M", bound=Message)
PARTS = ("sampling", "stopping", "response")
"""Of a GenerateRequest; options are given by the names of their fields, whose part is found here."""


@dataclass(frozen=True)
class FillInMiddle:
    """A prompt with a hole between two texts, for models trained on such."""

    prefix: str
    suffix: str
    suffix_first: bool = False  # the order in which the model reads them


Prompt = str | Sequence[int] | FillInMiddle
"""Text, token ids, or a text with a hole."""


@dataclass(frozen=True, kw_only=True)
class Beam:
    """Beam search, as transformers' num_beams, length_penalty, early_stopping, num_beam_groups, diversity_penalty."""

    width: int
    length_penalty: float | None = None
    early_stopping: Literal["EARLY_STOPPING_FALSE", "EARLY_STOPPING_TRUE", "EARLY_STOPPING_NEVER"] | None = None
    groups: int | None = None
    diversity_penalty: float | None = None


class StructuredOutputs(TypedDict, total=False):
    """What an answer's text has to follow: exactly one of json (a JSON schema), json_object, regex (Rust's notation),
    choice and grammar (Lark's notation).
    """

    json: str | Mapping[str, Any]
    json_object: bool
    regex: str
    choice: Sequence[str]
    grammar: str
    disable_any_whitespace: bool


class GenerateOptions(TypedDict, total=False):
    """How a prompt is continued; docs/limits.md has every range. None: as if it were not given."""

    max_new_tokens: int | None
    min_new_tokens: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    seed: int | None
    n: int | None
    best_of: int | None
    beam: Beam | Mapping[str, Any] | None
    stop_sequences: Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    ignore_eos: bool | None
    include_stop_sequence: bool | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    no_repeat_ngram_size: int | None
    logit_bias: Mapping[int, float] | None
    allowed_token_ids: Sequence[int] | None
    bad_words: Sequence[str] | None
    bad_word_ids: Sequence[Sequence[int]] | None
    no_speculation: bool | None
    structured_outputs: StructuredOutputs | None
    logprobs: int | None
    prompt_logprobs: int | None
    logprobs_temperature: float | None
    token_bytes: bool | None
    echo: bool | None
    timings: bool | None
    priority: int | None
    adapter: str | None
    request_id: str | None


def prompt_message(prompt: Prompt, where: str = "prompt") -> inference.Prompt:
    """Of text, of token ids, or of a text with a hole."""
    if isinstance(prompt, str):
        return filled(inference.Prompt(), {"text": prompt}, f"{where}.")
    if isinstance(prompt, FillInMiddle):
        order = "FIM_SUFFIX_FIRST" if prompt.suffix_first else "FIM_PREFIX_FIRST"
        hole = {"prefix": prompt.prefix, "suffix": prompt.suffix, "order": order}
        return filled(inference.Prompt(), {"fim": hole}, f"{where}.")
    if isinstance(prompt, bytes | bytearray | Mapping):
        raise SettingsError(f"{where} is {type(prompt).__name__}; give text, token ids or a FillInMiddle")
    return filled(inference.Prompt(), {"token_ids": {"ids": prompt}}, f"{where}.")


def prompt_messages(prompts: Sequence[Prompt], where: str) -> list[inference.Prompt]:
    """Of several; a single text, which is a sequence of characters, is refused."""
    if isinstance(prompts, str | FillInMiddle):
        raise SettingsError(f"{where} is one prompt; give a list of prompts")
    return [prompt_message(prompt, f"{where}[{index}]") for index, prompt in enumerate(prompts)]


def generate_request(prompts: list[inference.Prompt], options: Mapping[str, Any]) -> inference.GenerateRequest:
    """With each option in the part that has a field of its name. An unknown one is a SettingsError."""
    request = inference.GenerateRequest(prompts=prompts)
    for part in PARTS:
        getattr(request, part).SetInParent()
    for name, value in options.items():
        filled(_part_of(request, name), {name: value})
    return request


def _part_of(request: inference.GenerateRequest, name: str) -> Message:
    for message in (*(getattr(request, part) for part in PARTS), request):
        if name in message.DESCRIPTOR.fields_by_name and name not in (*PARTS, "prompts"):
            return message
    known = option_names()
    near = difflib.get_close_matches(name, known, 1)
    raise SettingsError(f"{name} is no option; " + (f"is {near[0]} meant?" if near else f"there is {', '.join(known)}"))


def option_names() -> list[str]:
    """All options of generation that the protocol has."""
    request = inference.GenerateRequest()
    names = {name for part in PARTS for name in getattr(request, part).DESCRIPTOR.fields_by_name}
    return sorted(names | set(request.DESCRIPTOR.fields_by_name) - {*PARTS, "prompts"})


def filled(message: M, values: Mapping[str, Any], where: str = "") -> M:
    """The message with these fields set; None leaves one unset. `where` goes before a field's name in errors."""
    for name, value in values.items():
        field = message.DESCRIPTOR.fields_by_name.get(name)
        if field is None:
            raise SettingsError(f"{where}{name} is no field of {message.DESCRIPTOR.name}")
        if value is None:
            continue
        if field.is_repeated and isinstance(value, str | bytes):
            raise SettingsError(f"{where}{name} is one {type(value).__name__}; give a list of them")
        try:
            message.MergeFrom(type(message)(**{name: _plain(name, value)}))
        except (TypeError, ValueError) as error:
            raise SettingsError(f"{where}{name} is {_shown(value)}: {error}") from error
    return message


def _plain(name: str, value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return {key: each for key, each in asdict(value).items() if each is not None}
    if name == "structured_outputs" and isinstance(value, Mapping):
        return {key: _guide(key, each) for key, each in value.items()}
    return [{"ids": ids} for ids in value] if name == "bad_word_ids" else value


def _guide(name: str, value: Any) -> Any:
    if name == "choice" and isinstance(value, str):
        raise ValueError("choice is one text; give a list of them")
    if name == "choice":
        return {"texts": value}
    return json.dumps(value) if name == "json" and isinstance(value, Mapping) else value


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
