"""The one ordered stream of commands: rank 0 issues, every other rank executes the same in the same order.

    (STEP, plan)    one engine step        (KEEP_ALIVE,)    rank 0 is there and has nothing to do
    (STOP,)         the end of the stream  (CANARY,)        a decode that proves every rank (see canary.py)
    (name, ...)     whatever else the group was taught (training, saving, ...)

A command travels as msgpack by the group's own collective: a name, then plain values (what was a tuple arrives as a
list). A handler that takes more makes it of them by its type, so bytes make nothing else come into being. While idle
rank 0 sends a keep-alive every second; a follower that hears nothing for `silence_s` fails, naming rank 0.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from msgspec import msgpack

from parallel.errors import CollectiveError
from parallel.ranks.comm import Comm
from parallel.ranks.flight_recorder import COMMAND, Flight

Command = tuple[Any, ...]

STEP = "step"
KEEP_ALIVE = "keep_alive"
STOP = "stop"
CANARY = "canary"
KEEP_ALIVE_S = 1.0


class Commands:
    """One rank's end of the stream. In a group of one (no comm) issuing costs nothing."""

    def __init__(self, comm: Comm | None, silence_s: float = 10.0, clock: Callable[[], float] = time.monotonic) -> None:
        self.comm, self.silence_s, self.clock = comm, silence_s, clock
        self.flight = Flight() if comm is None else comm.flight
        self.number = 0
        self._last = clock()

    def issue(self, *command: Any) -> None:
        """Rank 0: the next command for all other ranks."""
        self._last = self.clock()
        payload = b"" if self.comm is None else msgpack.encode(command)
        self._note(command[0], len(payload))
        if self.comm is not None:
            self.comm.broadcast_bytes(payload, self.silence_s)

    def keep_alive(self) -> None:
        """Rank 0, often while idle: sends a sign of life when one is due."""
        if self.clock() - self._last >= KEEP_ALIVE_S:
            self.issue(KEEP_ALIVE)

    def receive(self) -> Command:
        """Other ranks: the next command, whatever it is."""
        if self.comm is None:
            raise CollectiveError("a group of one has nobody to receive commands from; only other ranks follow")
        try:
            payload = self.comm.broadcast_bytes(None, self.silence_s)
        except CollectiveError as error:
            raise CollectiveError(
                f"rank {self.comm.rank} waited for a command from rank 0, which sends one at least every "
                f"{KEEP_ALIVE_S:g} s and is given up after {self.silence_s:g} s: {error}"
            ) from error
        command: Command = msgpack.decode(payload, type=tuple[Any, ...])
        self._note(command[0], len(payload))
        return command

    def _note(self, name: str, nbytes: int) -> None:
        self.number += 1
        self.flight.note(COMMAND, name, self.number, nbytes)
