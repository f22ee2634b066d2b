"""What a front-end refuses, and why a request that was admitted could not be finished.

Like all errors of the project each takes one message, so that it pickles; facts a client may want beside the message
are attributes set after construction (they travel with the pickle). Which status a client sees is decided by the
table in cluster/rpc/codec/error_status.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from parallel.errors import CapacityError, RequestError, TpError, WorkerError


@dataclass(frozen=True)
class Violation:
    """One field that breaks one rule."""

    field: str
    rule: str

    def __str__(self) -> str:
        return f"{self.field}: {self.rule}"


class InvalidRequest(RequestError):
    """Fields that break the rules of the interface; `violations` names each."""

    violations: tuple[Violation, ...] = ()

    @classmethod
    def of(cls, violations: Sequence[Violation]) -> InvalidRequest:
        error = cls("; ".join(map(str, violations)))
        error.violations = tuple(violations)
        return error


class DoesNotFit(CapacityError):
    """A field that asks for more than there can ever be room for; `violations` names it."""

    violations: tuple[Violation, ...] = ()

    @classmethod
    def of(cls, field: str, rule: str) -> DoesNotFit:
        violation = Violation(field, rule)
        error = cls(str(violation))
        error.violations = (violation,)
        return error


class NotImplementedField(RequestError):
    """A field of the interface that this version does not serve yet."""

    field: str = ""

    @classmethod
    def of(cls, field: str, instead: str) -> NotImplementedField:
        error = cls(f"{field}: not implemented yet; {instead}")
        error.field = field
        return error


class NoTokenizer(RequestError):
    """Text was given or asked for, and the checkpoint has no tokenizer."""


class NoGuides(RequestError):
    """A grammar was given, and this server cannot follow any: a package or what its tokens stand for is missing."""


class ReadingEnded(TpError, RuntimeError):
    """A prompt that was being read was ended (Abort, a drain, a deadline) before its answer was there."""


class WrongTask(RequestError):
    """The model behind this server has not the head that the call needs."""


class DuplicateRequest(RequestError):
    """A request of this id is still open."""


class RequestIdReused(RequestError):
    """An earlier call of this id, which is still remembered, asked something else."""


class Quarantined(RequestError):
    """Engines died while it was running, so often that it is not run again."""

    deaths: int = 0
    causes: tuple[str, ...] = ()


class RestartRefused(TpError, RuntimeError):
    """A rolling restart that cannot begin, or that stopped half-way."""


class Draining(TpError, RuntimeError):
    """The server finishes what it has and admits nothing more."""


class EngineFault(WorkerError):
    """The engine behind the front-end is gone. `retryable` where the same request may succeed later or elsewhere."""

    retryable: bool = True


class RequestFailed(TpError, RuntimeError):
    """The engine reported an error for this one request."""


class SlowReader(TpError, RuntimeError):
    """A client stopped reading its stream for longer than the server waits."""
