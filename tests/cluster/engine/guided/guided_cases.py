"""A vocabulary of printable characters, requests with grammars over it, and what their answers must be."""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Sequence as Many
from dataclasses import dataclass, replace
from typing import Any

import jsonschema

from cluster.engine.engine import Engine, Result
from cluster.engine.engine_builder import build_engine, build_runner
from cluster.engine.engine_config import EngineConfig
from cluster.engine.guided.grammar import choice_guide
from cluster.engine.request import FinishReason, Guide, Request, ResponseOptions, SamplingParams, StoppingCriteria
from cluster.engine.run.command_stream import Commands
from tests.cluster.engine.tiny_models import VOCAB
from tp_decoders.model.decoder import Decoder

END = 0
OUTPUTS = int(os.environ.get("GUIDED_OUTPUTS", "48"))
"""Answers that are checked; `make test` has few."""
PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "bc", None, 2.5]}, "maxItems": 2},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
NESTED: dict[str, Any] = {
    "type": "object",
    "properties": {"x": {"anyOf": [{"type": "boolean"}, {"$ref": "#/$defs/p"}]}},
    "required": ["x"],
    "additionalProperties": False,
    "$defs": {"p": {"type": "array", "items": {"type": "integer", "minimum": -9, "maximum": 9}, "minItems": 2,
                    "maxItems": 2}},
}  # fmt: skip
DATE = r"[12][0-9]{3}-(0[1-9]|1[0-2])-[0-3][0-9]"
CHOICES = ("yes", "no", "no way", "a (b|c)* \\d")
PAIRS = 'start: "(" b ")" | x\nb: "(" c ")" | x\nc: "(" x ")" | x\nx: "x"{1,3}'
GUIDES = (
    Guide(kind="json", text=json.dumps(PERSON), any_whitespace=False),
    Guide(kind="json", text=json.dumps(NESTED), any_whitespace=False),
    Guide(kind="regex", text=DATE),
    choice_guide(CHOICES),
    Guide(kind="grammar", text=PAIRS),
)


@dataclass(frozen=True)
class Characters:
    """Token 0 ends a text, 1 to 95 are the printable characters, 96 is a line end; others are nothing."""

    vocab_size: int = VOCAB
    ends: tuple[int, ...] = (END,)

    @property
    def pieces(self) -> tuple[bytes, ...]:
        found = [b"<end>", *(bytes([31 + i]) for i in range(1, 96)), b"\n"]
        return tuple((found + [b""] * self.vocab_size)[: self.vocab_size])

    @property
    def special_ids(self) -> frozenset[int]:
        return frozenset({END})

    def spelled(self, text: str) -> list[int]:
        return [96 if byte == 10 else byte - 31 for byte in text.encode() if byte == 10 or 31 < byte < 127]


def text_of(ids: Many[int]) -> str:
    return b"".join(Characters().pieces[i] for i in ids).decode()


def guided_engine(model: Decoder, commands: Commands | None = None, ends: Many[int] = (END,), **sizes: Any) -> Engine:
    config = EngineConfig(**{"kv_blocks": 100, "max_sequences": 24, "max_step_tokens": 96, **sizes})
    return build_engine(
        build_runner(model, config, 0), config, ends, commands, tables=lambda size, ends: Characters(size, tuple(ends))
    )


def guided(number: int, guide: Guide, most: int = 90, **sampling: Any) -> Request:
    rng = random.Random(number)
    given = {"temperature": 1.0, "seed": number, **sampling}
    return Request(
        request_id=f"guided{number}",
        token_ids=tuple(rng.randrange(1, VOCAB) for _ in range(rng.randrange(1, 30))),
        sampling=SamplingParams(guide=guide, **given),
        stopping=StoppingCriteria(max_new_tokens=most),
        response=ResponseOptions(logprobs=2 if number % 3 == 0 else None),
    )


def many_guided(count: int) -> list[Request]:
    """Drawn and greedy ones, with several samples, with cuts and penalties."""
    more: tuple[dict[str, Any], ...] = (
        {}, {"n": 2}, {"temperature": 0.0}, {"top_k": 5, "top_p": 0.9}, {"best_of": 2}, {"frequency_penalty": 0.5},
        {"logit_bias": {9: 3.0}},
    )  # fmt: skip
    return [guided(i, GUIDES[i % len(GUIDES)], **more[i % len(more)]) for i in range(count)]


def without(requests: Many[Request]) -> list[Request]:
    """Others, which have no grammar."""
    return [
        replace(each, request_id=f"free{i}", sampling=replace(each.sampling, guide=None, n=1, best_of=None))
        for i, each in enumerate(requests)
    ]


def check(request: Request, results: Many[Result]) -> None:
    """Every sample is complete, and what its grammar says."""
    assert request.sampling.guide is not None
    for result in results:
        text = text_of(result.token_ids)
        assert result.finish_reason is FinishReason.STOP, (request.request_id, text, result.error)
        check_text(request.sampling.guide, text)


def check_text(guide: Guide, text: str) -> None:
    if guide.kind == "json":
        jsonschema.validate(json.loads(text), json.loads(guide.text))
        assert guide.any_whitespace or "\n" not in text
    elif guide.kind == "regex":
        assert re.fullmatch(guide.text, text), text
    elif guide.kind == "choice":
        assert text in json.loads(guide.text)
    elif guide.kind == "grammar":
        middle = text.strip("()")
        depth = len(text) - len(text.lstrip("("))
        assert text == "(" * depth + middle + ")" * depth and re.fullmatch("x{1,3}", middle), text
