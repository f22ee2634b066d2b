"""What the engine is asked and what it answers: token ids in, token events out.

Plain frozen values that travel by their types (cluster/link/messages.py); text, stop strings and protobuf messages live
above. Validation against a model's limits is `cluster.engine.request_validation.validate`; the defaults are a Hugging
Face user's.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from msgspec import Struct

from cluster.engine.top_logprobs import NO_ALTERNATIVES, Alternatives
from tp_decoders.model.task_config import TaskConfig


class FinishReason(enum.Enum):
    """Why a sample ended."""

    STOP = "stop"  # end-of-sequence or a stop token id, or (decided above the engine) a stop string
    LENGTH = "length"  # max_new_tokens, or the model's context is full
    ABORTED = "aborted"  # the client went away or asked for it
    DEADLINE = "deadline"  # the request's time ran out
    ERROR = "error"


@dataclass(frozen=True, kw_only=True)
class BeamParams:
    """Beam search, as in transformers' generate: width is num_beams, groups num_beam_groups.

    early_stopping False: until no running beam is taken to be able to do better at its present length; True: as soon
    as `width` sequences are finished; "never": until none can do better at any length.
    """

    width: int
    length_penalty: float = 1.0  # a sequence's score is sum(log-probabilities) / length ** length_penalty
    early_stopping: bool | Literal["never"] = False
    groups: int = 1
    diversity_penalty: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Guide:
    """A grammar that an answer's text must follow, from its first token to its end.

    text: a JSON schema ("json"), a regular expression, a JSON list of texts ("choice"), a grammar in Lark's notation;
    none of "json_object", which is any object. any_whitespace False: JSON without blanks between its parts.
    """

    kind: Literal["json", "json_object", "regex", "choice", "grammar"]
    text: str = ""
    any_whitespace: bool = True


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the next token is drawn. temperature 0 is greedy; None means 'no cut'.

    best_of samples are drawn and the n with the highest mean log-probability come back. With `beam` nothing is drawn.
    """

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
    no_repeat_ngram_size: int = 0  # no run of this many tokens twice, the prompt included; 0: no rule
    best_of: int | None = None
    beam: BeamParams | None = None
    no_speculation: bool = False  # no drafts are tried; the answer is the same
    guide: Guide | None = None  # what the text must follow

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def num_samples(self) -> int:
        """How many samples are computed."""
        return self.best_of or self.n


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
class Pooling:
    """What is wanted of a prompt in place of new tokens: a task head's outputs, or else hidden states, of some rows."""

    rows: Literal["last", "mean", "all"] = "last"
    head: bool = True
    normalize: bool = False  # each row to length 1


@dataclass(frozen=True)
class Share:
    """Whose a request is: callers share an engine by weight, and so do the parts of one caller among them."""

    caller: str = ""
    part: str = ""
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt to be continued (n samples, which share its cache). `resumed_ids` were sent before a restart."""

    request_id: str
    token_ids: tuple[int, ...]
    sampling: SamplingParams = SamplingParams()
    stopping: StoppingCriteria = StoppingCriteria()
    response: ResponseOptions = ResponseOptions()
    priority: int = 0  # lower goes first of its caller's; a level is worth engine.priority_patience seconds
    deadline: float | None = None  # seconds from submission
    resumed_ids: tuple[
        tuple[int, ...], ...
    ] = ()  # per sample: tokens generated before a rebuild; the engine goes on after them
    finished_samples: tuple[
        int, ...
    ] = ()  # samples that had ended before a rebuild: they are neither run nor answered again
    score_only: bool = False  # prompt log-probabilities only: no token is generated
    pooling: Pooling | None = None  # the prompt is read and answered: no token is generated
    traced: bool = False  # its steps are reported
    share: Share = Share()

    @property
    def wants_tokens(self) -> bool:
        """Whether the answer is about the prompt's own tokens."""
        return self.score_only or (self.pooling is not None and self.pooling.rows == "all")

    @property
    def continues(self) -> bool:
        """Whether tokens are generated."""
        return not self.score_only and self.pooling is None


@dataclass(frozen=True)
class TokenLogprobs:
    """The log-probability of one token and the most likely alternatives, best first."""

    token_id: int
    logprob: float
    top: Alternatives = NO_ALTERNATIVES


@dataclass(frozen=True)
class Timings:
    """Seconds from submission."""

    queued: float
    first_token: float
    total: float


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """One step that computed something of a traced request."""

    step: int
    seconds: float
    forward_seconds: float
    sample_seconds: float
    tokens: int  # of this request, of all its samples
    batch_tokens: int
    batch_sequences: int
    preempted: int  # how often the request gave its blocks back so far

    def values(self) -> dict[str, int | float]:
        """Of the step itself."""
        return {name: value for name, value in vars(self).items() if name not in ("seconds", "preempted")}


class TokenEvent(Struct, frozen=True, kw_only=True, array_like=True, tag=0):
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
    pooled: tuple[tuple[float, ...], ...] | None = None  # of a pooled request, with its end
    weight_version: int = 0
    timings: Timings | None = None
    score: float | None = None  # of a beam search's sequence
    stop_logprob: float | None = None  # of a stop token that is not in token_ids, where log-probabilities are known
    step: StepReport | None = None  # alone in its event, ahead of those of the step


@dataclass(frozen=True, kw_only=True)
class ModelLimits:
    """What a front-end must know about the model behind an engine in order to refuse what can never work."""

    vocab_size: int
    max_context: int
    kv_capacity_tokens: int
    eos_token_ids: tuple[int, ...] = ()
    max_batch: int = 0
    task: TaskConfig | None = None  # None: a language model
    state_size: int = 0  # numbers of a hidden state
    block_size: int = 1  # tokens of the cache that are given out together
    new_tokens: int | None = None  # of an answer where a call does not say, as its files have it; None: what is left


@dataclass(frozen=True, kw_only=True)
class RankReport:
    """What one rank said of itself with its last canary."""

    rank: int
    node: str
    pid: int
    memory_bytes: int  # resident, of its process
    device_memory_bytes: int = 0  # allocated on its GPU
    collectives: int = 0  # since its group was built
    collective_bytes: int = 0
    collective_seconds: float = 0.0  # without waiting for commands


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
    schedule_seconds: float = 0.0
    sample_seconds: float = 0.0
    commit_seconds: float = 0.0
    replayed_steps: int = 0  # of the steps, those that ran as a recorded program
    prefix_tokens_looked_up: int = 0  # of prompts that were admitted
    prefix_tokens_reused: int = 0  # of these, found in the cache
    kv_blocks_cached: int = 0  # of the free ones, remembered for prompts to come
    drafts: int = 0  # of sequences: one in a step each
    draft_tokens: int = 0  # of these
    accepted_draft_tokens: int = 0  # of these, came true: each saved its sequence a step
    guided_requests: int = 0  # that came with a grammar
    guide_compiles: int = 0  # of grammars that were not in the cache
    guide_compile_seconds: float = 0.0
    guide_masks: int = 0  # of tokens that a grammar allows, one per row
    guide_mask_seconds: float = 0.0  # with following what was generated
    canaries: int = 0
    canary_fault: str = ""  # what the last one found
    ranks: tuple[RankReport, ...] = ()  # as of the last one
    collectives: Mapping[str, tuple[int, int]] = field(default_factory=dict)  # rank 0's, by kind: count and bytes
    collective_seconds: Mapping[str, float] = field(default_factory=dict)  # rank 0's, by kind; waiting for peers too
