"""Why a call was turned away before it began. The words name tokens by their names, never by their text."""

from __future__ import annotations

from parallel.errors import CapacityError, QueueFull, TpError


class NotAuthenticated(TpError, PermissionError):
    """Nobody knows who is calling."""


class NotPermitted(TpError, PermissionError):
    """The caller is known and may not do this."""


class RateLimited(QueueFull):
    """The caller's token has made as many calls as it may for now."""

    @classmethod
    def of(cls, name: str, rate: float, seconds: float) -> RateLimited:
        error = cls(f"token {name!r} may make {rate:g} calls per second; retry in {seconds:.2f} s")
        error.retry_seconds = seconds
        return error


class TokensInFlight(QueueFull):
    """The caller's open calls hold as many tokens as its token may have in flight."""


class TooManyCalls(QueueFull):
    """One client has as many calls open as one client may."""


class AnswersUnread(QueueFull):
    """A client has more answers on their way than may wait for it to read them."""


class OverQuota(CapacityError):
    """One call alone is more than the caller's token may ever have in flight."""


class SlowSender(TpError, RuntimeError):
    """A client opened a call and did not send its message."""
