"""What the engine is asked and what it answers: token ids in, token events out.

Plain frozen dataclasses that pickle; text, stop strings and protobuf messages live above. Validation against a
model's limits is `cluster.engine.validation.validate`; the defaults are a Hugging Face user's.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field


class FinishReason(enum.Enum):
    """Why a sample ended."""

    STOP = "stop"  # end-of-sequence or a stop token id, or (decided above the engine) a stop string
    LENGTH = "length"  # max_new_tokens, or the model's context is full
    ABORTED = "aborted"  # the client went away or asked for it
    DEADLINE = "deadline"  # the request's time ran out
    ERROR = "error"


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the next token is drawn. temperature 0 is greedy; None means 'no cut'."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None
    n: int = 1
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[tuple[int, ...], ...] = ()

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0


@dataclass(frozen=True, kw_only=True)
class StoppingCriteria:
    """When a sample ends. max_new_tokens None: what is left of the context; stop strings are matched elsewhere."""

    max_new_tokens: int | None = None
    min_new_tokens: int = 0
    stop_sequences: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop_sequence: bool = False


@dataclass(frozen=True, kw_only=True)
class ResponseOptions:
    """What comes back besides tokens. logprobs = k: the chosen token's log-probability and the k most likely ones."""

    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logprobs_temperature: float = 1.0
    token_bytes: bool = False
    echo: bool = False
    timings: bool = False


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt to be continued (n samples, which share its cache). `resumed_ids` were sent before a restart."""

    request_id: str
    token_ids: tuple[int, ...]
    sampling: SamplingParams = SamplingParams()
    stopping: StoppingCriteria = StoppingCriteria()
    response: ResponseOptions = ResponseOptions()
    priority: int = 0  # lower goes first; a level is worth engine.priority_patience seconds of waiting
    deadline: float | None = None  # seconds from submission
    resumed_ids: tuple[
        tuple[int, ...], ...
    ] = ()  # per sample: tokens generated before a rebuild; the engine goes on after them
    finished_samples: tuple[
        int, ...
    ] = ()  # samples that had ended before a rebuild: they are neither run nor answered again
    score_only: bool = False  # prompt log-probabilities only: no token is generated


@dataclass(frozen=True)
class TokenLogprobs:
    """The log-probability of one token and the most likely alternatives, best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Timings:
    """Seconds from submission."""

    queued: float
    first_token: float
    total: float


@dataclass(frozen=True, kw_only=True)
class TokenEvent:
    """Something that happened to one sample of one request: new tokens, the prompt's log-probabilities, or its end."""

    request_id: str
    sample_index: int = 0
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()  # one per new token where asked for
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = (
        None  # one per prompt token after the first; sent once, with sample 0
    )
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = (
        None  # the stop token that ended the sample; it is not in token_ids unless asked to be included
    )
    error: str | None = None
    weight_version: int = 0
    timings: Timings | None = None


@dataclass(frozen=True, kw_only=True)
class ModelLimits:
    """What a front-end must know about the model behind an engine in order to refuse what can never work."""

    vocab_size: int
    max_context: int
    kv_capacity_tokens: int
    eos_token_ids: tuple[int, ...] = ()
    max_batch: int = 0


@dataclass(frozen=True, kw_only=True)
class EngineLoad:
    """A snapshot of the engine's counters."""

    running: int = 0
    waiting: int = 0
    kv_blocks_total: int = 0
    kv_blocks_free: int = 0
    preemptions: int = 0
    steps: int = 0
    generated_tokens: int = 0
    prompt_tokens: int = 0
    finished_requests: int = 0
    aborted_requests: int = 0
    weight_version: int = 0
    step_seconds: float = 0.0
    forward_seconds: float = 0.0
