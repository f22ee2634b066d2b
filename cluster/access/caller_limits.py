"""How much one caller may do at once: calls per second, tokens in flight, calls open. In memory, by name.

An account outlives changes of the token file, so that editing it lifts no limit that is being used up. Used from one
event loop only.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from cluster.access.access_errors import OverQuota, RateLimited, TokensInFlight, TooManyCalls
from cluster.access.token_file import MAX_PRIORITY, Grant
from cluster.engine.request import Share


@dataclass
class Account:
    """What one token uses. Its calls are counted with everybody's, in OpenCalls."""

    grant: Grant
    clock: Callable[[], float]
    in_flight: int = 0
    _allowance: float | None = field(default=None, repr=False)
    _filled: float = field(default=0.0, repr=False)

    def count_call(self) -> None:
        """One more call now. A second's worth may come at once, and always one."""
        rate = self.grant.requests_per_second
        if rate is None:
            return
        now, most = self.clock(), max(1.0, rate)
        have = most if self._allowance is None else min(most, self._allowance + (now - self._filled) * rate)
        self._filled, self._allowance = now, have
        if have < 1.0:
            raise RateLimited.of(self.grant.name, rate, (1.0 - have) / rate)
        self._allowance = have - 1.0

    def reserve(self, tokens: int) -> None:
        """Tokens of a call that begins: those read and those it may write. Give them back with `release`."""
        most = self.grant.tokens_in_flight
        who = f"token {self.grant.name!r} may have {most} tokens in flight"
        if most is not None and tokens > most:
            raise OverQuota(f"{who}, this call alone is {tokens} (read, and at most written); send less at a time")
        if most is not None and self.in_flight + tokens > most:
            raise TokensInFlight(f"{who}, {self.in_flight} are and this call would add {tokens}; retry later")
        self.in_flight += tokens

    def release(self, tokens: int) -> None:
        self.in_flight -= tokens
        assert self.in_flight >= 0, "more tokens were given back than taken"

    @contextmanager
    def hold(self, tokens: int) -> Iterator[None]:
        """Reserved meanwhile."""
        self.reserve(tokens)
        try:
            yield
        finally:
            self.release(tokens)


class Accounts:
    """One account for each name."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._by_name: dict[str, Account] = {}

    def of(self, grant: Grant) -> Account:
        account = self._by_name.setdefault(grant.name, Account(grant, self._clock))
        account.grant = grant  # as the file says now
        return account


class OpenCalls:
    """Calls that are open, by client; no client has more than its share. Where most of the places of all are taken
    (`in_all`), nobody gets another one who has as many as there would be for each.
    """

    def __init__(self, most: int, in_all: int = 1 << 62) -> None:
        self._most, self._in_all = most, in_all
        self._open: Counter[str] = Counter()
        self._total = 0

    @contextmanager
    def one_of(self, client: str, most: int | None = None) -> Iterator[None]:
        """One more call of this client while it lasts, or TooManyCalls."""
        limit = self._limit(client, self._most if most is None else min(most, self._most))
        if self._open[client] >= limit:
            if not self._open[client]:
                del self._open[client]
            raise TooManyCalls(f"{client} has {limit} calls open, as many as it may now; wait for one to end")
        self._open[client] += 1
        self._total += 1
        try:
            yield
        finally:
            self._open[client] -= 1
            self._total -= 1
            if not self._open[client]:
                del self._open[client]

    def _limit(self, client: str, most: int) -> int:
        if self._total < self._in_all * 3 // 4:
            return most
        others = len(self._open) - (client in self._open)
        if self._total >= self._in_all:
            raise TooManyCalls(f"{self._total} calls are open, all that there may be; retry later")
        return min(most, max(1, self._in_all // (others + 1)))


@dataclass(frozen=True, kw_only=True)
class Terms:
    """On which terms a call is served: whose part of the engine it takes, and how far its priority counts."""

    share: Share = Share()
    levels: int = MAX_PRIORITY


TERMS: ContextVar[Terms | None] = ContextVar("terms", default=None)
"""Of the call that is being answered in this context."""
WHO: ContextVar[str] = ContextVar("who", default="")
"""Whose request ids are meant in this context: a token's or a certificate's; of callers without a name all are one."""
CALLER: ContextVar[Account | None] = ContextVar("caller", default=None)
"""The account of the call that is being answered in this context, if callers have accounts."""
