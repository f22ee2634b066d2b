"""What a caller of the front-end asks for: one call of many prompts, as text or token ids. Nothing here is checked
yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Protocol

from cluster.engine.request import ResponseOptions, SamplingParams, Share, StoppingCriteria
from parallel.errors import ConfigError
from parallel.options import check_above_zero

if TYPE_CHECKING:
    from cluster.frontend.requests.classify_embed import Reading  # which brings in torch


@dataclass(frozen=True)
class FillInMiddle:
    """Text before and after what the model is to write; `suffix_first` is the second order models are trained on."""

    prefix: str
    suffix: str
    suffix_first: bool = False


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """Exactly one of the three. The ids may be any sequence: copied only once they are known to be not too many."""

    text: str | None = None
    token_ids: Sequence[int] | None = None
    fim: FillInMiddle | None = None


class Account(Protocol):
    """Whose call it is, and the tokens it may have in flight."""

    def reserve(self, tokens: int) -> None:
        """Raises where these are too many."""

    def release(self, tokens: int) -> None:
        """Gives them back."""


@dataclass(frozen=True, kw_only=True)
class Call:
    """Prompts to be continued, or only scored (`score`), or read and answered (`reading`). `bad_words` are texts,
    sampling.bad_words holds token ids.
    """

    prompts: tuple[Prompt, ...]
    request_id: str = ""
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stopping: StoppingCriteria = field(default_factory=StoppingCriteria)
    response: ResponseOptions = field(default_factory=ResponseOptions)
    bad_words: tuple[str, ...] = ()
    priority: int = 0
    deadline: float | None = None
    score: bool = False
    reading: Reading | None = None
    answer_bytes: int | None = None  # that the one message holds in which it is answered; None: it streams
    account: Account | None = None
    caller: str = ""  # whose request_id it is
    share: Share = Share()  # whose part of the engine it takes
    levels: int | None = None  # of priority that count, in either direction; None: all

    @property
    def level(self) -> int:
        """The nearest to its priority that it may have."""
        return self.priority if self.levels is None else max(-self.levels, min(self.levels, self.priority))

    @property
    def prompts_field(self) -> str:
        """What the prompts are called in the interface."""
        return "sequences" if self.score or self.reading else "prompts"


@dataclass(frozen=True, kw_only=True)
class RoutingConfig:
    """How prompts are spread over replicas."""

    block_tokens: int = 16  # compared at once; as engine.block_size, or a divisor of it
    max_blocks: int = 65536  # remembered of each replica
    slack_tokens: int = 16384  # a known beginning counts while its replica has at most so many more to do

    def __post_init__(self) -> None:
        for name in ("block_tokens", "max_blocks"):
            if getattr(self, name) < 1:
                raise ConfigError(f"frontend.routing.{name} is {getattr(self, name)}; give at least 1")
        if self.slack_tokens < 0:
            raise ConfigError(f"frontend.routing.slack_tokens is {self.slack_tokens}; give 0 (by load alone) or more")


@dataclass(frozen=True, kw_only=True)
class FrontendConfig:
    """Bounds a front-end keeps whatever model is behind it."""

    max_open_requests: int = 4096  # samples in the journal, over all prompts
    max_prompts_per_call: int = 1024  # more are refused
    max_n: int = 64  # samples of a prompt
    max_train_tokens: int = 131072  # of one training call
    max_logprobs: int = 64  # alternatives of a token
    max_stop_sequences: int = 64  # of a call
    max_stop_length: int = 1024  # characters
    max_bad_words: int = 1024  # of a call
    max_guide_length: int = 131072  # characters of a grammar
    max_guide_seconds: float = 5.0  # that compiling one may take
    max_id_list: int = 65536  # entries of logit_bias, allowed_token_ids, stop_token_ids; ids of all bad words
    max_list_entries: int = 1 << 22  # of these lists, over all prompts of a call
    max_request_id: int = 256  # characters
    max_chars_per_token: int = 128  # a longer text cannot fit the context; refused before it is tokenized
    inline_chars: int = 1024  # longer texts are tokenized beside the event loop, longer runs of tokens decoded there
    recovery_seconds: float = 0.0  # how long open requests wait for a new engine after a fault
    routing: RoutingConfig = field(default_factory=RoutingConfig)

    def __post_init__(self) -> None:
        check_above_zero("frontend", self, (f.name for f in fields(self) if f.name.startswith(("max_", "inline_"))))
        if not self.recovery_seconds >= 0:
            raise ConfigError(f"frontend.recovery_seconds is {self.recovery_seconds:g}; give seconds, 0 or more")
