"""Answers of Inference as values: frozen, comparable, picklable, without the protocol's messages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from tp_decoders.client.errors import ServiceError
from tp_decoders.client.values.from_message import local, named, read


class FinishReason(StrEnum):
    """Why a sample ended; in the order of the protocol's numbers."""

    STOP = "stop"  # end-of-sequence, stop token or stop sequence
    LENGTH = "length"  # max_new_tokens, or the context is full
    ABORTED = "aborted"  # by Abort, or a drain whose grace time ran out
    DEADLINE = "deadline"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token and its log-probability."""

    token_id: int
    logprob: float


@dataclass(frozen=True, slots=True)
class PromptLogprob:
    """A prompt's token, its log-probability, and the likeliest tokens at its place."""

    token_id: int
    logprob: float
    top: tuple[TokenLogprob, ...]


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds from the request's admission."""

    queued: float | None
    first_token: float | None
    total: float


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens in and out."""

    prompt_tokens: int
    completion_tokens: int

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class Sample:
    """One continuation of a prompt. Lists per token are as long as `token_ids`, or empty where not asked for."""

    index: int
    text: str  # empty where the checkpoint has no tokenizer
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    top_logprobs: tuple[tuple[TokenLogprob, ...], ...]
    token_bytes: tuple[bytes, ...]
    finish_reason: FinishReason | None
    stop_sequence: str
    stop_token_id: int | None
    weight_version: int
    score: float | None  # of a beam; with best_of the mean log-probability
    timings: Timings | None


@dataclass(frozen=True, slots=True)
class Generation:
    """The answer to one prompt: its samples, best first where they have scores. Of a prompt that failed there are
    none, and `error` says why; what reads the first sample then raises it.
    """

    prompt_index: int
    prompt_tokens: int
    samples: tuple[Sample, ...]
    prompt_logprobs: tuple[PromptLogprob, ...]  # of each token after the first
    prompt_token_ids: tuple[int, ...]  # with echo
    request_id: str = local()
    used: Mapping[str, float | int | bool] = local()  # as the server took them: seed, max_new_tokens, ...
    error: ServiceError | None = local()

    @property
    def sample(self) -> Sample:
        """The first one."""
        if self.error is not None:
            raise self.error
        return self.samples[0]

    @property
    def text(self) -> str:
        return self.sample.text

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.sample.token_ids

    @property
    def logprobs(self) -> tuple[float, ...]:
        return self.sample.logprobs

    @property
    def finish_reason(self) -> FinishReason | None:
        return self.sample.finish_reason

    @property
    def weight_version(self) -> int:
        return self.sample.weight_version

    @property
    def seed(self) -> int | None:
        """That gives the same answer again."""
        seed = self.used.get("seed")
        return None if seed is None else int(seed)

    @property
    def usage(self) -> Usage:
        return Usage(self.prompt_tokens, sum(len(sample.token_ids) for sample in self.samples))


@dataclass(frozen=True, slots=True)
class Chunk:
    """What is new of one sample. `finish_reason` ends it; `error` ends its prompt. The prompt's own facts (`used`,
    `prompt_tokens`, ...) come with its first chunk.
    """

    prompt_index: int
    sample_index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    top_logprobs: tuple[tuple[TokenLogprob, ...], ...]
    token_bytes: tuple[bytes, ...]
    finish_reason: FinishReason | None
    stop_sequence: str
    stop_token_id: int | None
    weight_version: int
    score: float | None
    timings: Timings | None
    prompt_logprobs: tuple[PromptLogprob, ...]
    prompt: PromptFacts | None = local()
    error: ServiceError | None = local()


@dataclass(frozen=True, slots=True)
class PromptFacts:
    """What is said of a prompt once."""

    request_id: str
    prompt_tokens: int
    prompt_token_ids: tuple[int, ...]  # with echo
    has_text: bool  # the model has a tokenizer: what is written comes as text too
    used: Mapping[str, float | int | bool] = local()


@dataclass(frozen=True, slots=True)
class Score:
    """Log-probabilities of a sequence's tokens after the first."""

    sequence_index: int
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    top_logprobs: tuple[tuple[TokenLogprob, ...], ...]
    weight_version: int
    request_id: str = local()
    error: ServiceError | None = local()


@dataclass(frozen=True, slots=True)
class LabelScores:
    """What a head says of a sequence or a token."""

    logits: tuple[float, ...]
    probabilities: tuple[float, ...]
    label_id: int | None
    label: str


@dataclass(frozen=True, slots=True)
class Span:
    """An answer in a text: tokens start to end, both included."""

    start: int
    end: int
    score: float
    text: str


@dataclass(frozen=True, slots=True)
class Classification:
    """What the head of the server's task makes of one sequence."""

    sequence_index: int
    scores: LabelScores | None
    token_scores: tuple[LabelScores, ...] = named("tokens")
    spans: tuple[Span, ...] = ()
    start_logits: tuple[float, ...] = ()
    end_logits: tuple[float, ...] = ()
    token_ids: tuple[int, ...] = ()
    weight_version: int = 0
    error: ServiceError | None = local(default=None)


@dataclass(frozen=True, slots=True)
class Choice:
    """Which of several sequences in turn is chosen; `best` counts from `first_sequence`."""

    first_sequence: int
    probabilities: tuple[float, ...]
    best: int


@dataclass(frozen=True, slots=True)
class Classifications:
    """One result per sequence, and the choices among them of a double-heads model."""

    task: str
    labels: tuple[str, ...]
    choices: tuple[Choice, ...]
    request_id: str
    results: tuple[Classification, ...] = local()


@dataclass(frozen=True, slots=True)
class Embedding:
    """A sequence as one vector."""

    sequence_index: int
    values: tuple[float, ...]
    tokens: int
    weight_version: int
    request_id: str = local()
    error: ServiceError | None = local()


def generations(message: Any) -> list[Generation]:
    return [
        read(Generation, result, request_id=message.request_id, used=_used(result.used),
             error=ServiceError.of_item(result.status, message.request_id))
        for result in message.results
    ]  # fmt: skip


def chunk(message: Any, request_id: str) -> Chunk:
    facts = None
    if message.HasField("prompt"):
        facts = read(PromptFacts, message.prompt, used=_used(message.prompt.used))
    error = ServiceError.of_item(message.status, request_id) if message.HasField("status") else None
    return read(Chunk, message, prompt=facts, error=error)


def scores(message: Any) -> list[Score]:
    return [read(Score, one, **_call(message, one)) for one in message.results]


def embeddings(message: Any) -> list[Embedding]:
    return [read(Embedding, one, **_call(message, one)) for one in message.results]


def classifications(message: Any) -> Classifications:
    results = tuple(read(Classification, one, error=_call(message, one)["error"]) for one in message.results)
    return read(Classifications, message, results=results)


def token_lists(message: Any) -> list[tuple[int, ...]]:
    return [tuple(result.ids) for result in message.results]


def _call(message: Any, item: Any) -> dict[str, object]:
    return {"request_id": message.request_id, "error": ServiceError.of_item(item.status, message.request_id)}


def _used(message: Any) -> dict[str, float | int | bool]:
    parts = (message.sampling, message.stopping)
    return {field.name: value for part in parts for field, value in part.ListFields() if isinstance(value, int | float)}


def texts(message: Any) -> list[str]:
    """All of them; the first one that has no text is raised."""
    for result in message.results:
        if (error := ServiceError.of_item(result.status)) is not None:
            raise error
    return [result.text for result in message.results]
