"""The protocol's request messages from plain Python values, for the clients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tp_decoders.protocol import inference_pb2 as inference
from tp_decoders.protocol import training_pb2 as training

Prompt = str | Sequence[int] | inference.Prompt
Fields = Mapping[str, Any]


def prompt_message(prompt: Prompt) -> inference.Prompt:
    """Of text, of token ids, or as it is: a prompt with a hole is Prompt(fim={"prefix": ..., "suffix": ...})."""
    if isinstance(prompt, inference.Prompt):
        return prompt
    if isinstance(prompt, str):
        return inference.Prompt(text=prompt)
    return inference.Prompt(token_ids=inference.TokenIds(ids=prompt))


def generate_request(
    prompts: Sequence[Prompt],
    *,
    sampling: Fields | None = None,
    stopping: Fields | None = None,
    response: Fields | None = None,
    request_id: str = "",
    priority: int = 0,
) -> inference.GenerateRequest:
    """A GenerateRequest from plain values; field names are the protocol's."""
    return inference.GenerateRequest(
        request_id=request_id,
        prompts=map(prompt_message, prompts),
        sampling=inference.SamplingParams(**(sampling or {})),
        stopping=inference.StoppingCriteria(**(stopping or {})),
        response=inference.ResponseOptions(**(response or {})),
        priority=priority,
    )


def score_request(sequences: Sequence[Prompt], **fields: Any) -> inference.ScoreRequest:
    return inference.ScoreRequest(sequences=map(prompt_message, sequences), **fields)


def train_sequences(sequences: Sequence[Sequence[int] | Fields]) -> list[training.TrainSequence]:
    """From token ids alone, or from fields named as in the protocol."""
    return [training.TrainSequence(**(s if isinstance(s, Mapping) else {"token_ids": s})) for s in sequences]
