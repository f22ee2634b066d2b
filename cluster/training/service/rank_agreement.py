"""How a part of a training call went on each rank, agreed upon by all of them: a call fails on every rank or on none.

One small gather for each part, none in a group of one. What breaks a collective itself is not agreed upon: that is the
group's end, as ever.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from enum import IntEnum

import torch

from cluster.training.step.nonfinite_errors import BrokenUpdate
from parallel.errors import CheckpointError, ConfigError, RequestError, TpError, WorkerError
from parallel.ranks.group import Group

log = logging.getLogger(__name__)
NOTE_BYTES = 512


class Verdict(IntEnum):
    """What kind of failure; each rank's note begins with it."""

    FINE = 0
    REFUSED = 1  # the request's own fault
    NUMBERS = 2  # a loss or gradient that is not finite: some sequence's fault
    UNFIT = 3  # numbers that cannot be applied, with no sequence to blame
    FILES = 4
    FAILED = 5  # anything else


@dataclass(frozen=True)
class Failure:
    """Of the first rank that has one."""

    verdict: Verdict
    words: str
    everywhere: bool  # on all ranks


def verdict_of(error: Exception | None) -> Verdict:
    if error is None:
        return Verdict.FINE
    if isinstance(error, RequestError):
        return Verdict.REFUSED
    if isinstance(error, BrokenUpdate | ConfigError):
        return Verdict.UNFIT
    if isinstance(error, FloatingPointError):
        return Verdict.NUMBERS
    return Verdict.FILES if isinstance(error, CheckpointError) else Verdict.FAILED


def agree(error: Exception | None, tp: Group, device: torch.device | str) -> Failure | None:
    """On every rank at once, with what its own part raised: the failure of all, or None where no rank has one."""
    verdict = verdict_of(error)
    words = "" if error is None else str(error) if isinstance(error, TpError) else repr(error)
    if verdict is Verdict.FAILED:
        log.error("a training call failed on rank %d", tp.rank, exc_info=error)
    if tp.size == 1:
        return None if error is None else Failure(verdict, words, everywhere=True)
    own = (bytes([verdict]) + words.encode())[:NOTE_BYTES].ljust(NOTE_BYTES, b"\0")
    given = torch.frombuffer(bytearray(own), dtype=torch.uint8).to(device)
    notes = [
        bytes(note.tolist()) for note in tp.talk.all_gather(given, [NOTE_BYTES] * tp.size, 0).cpu().split(NOTE_BYTES)
    ]
    failed = [rank for rank, note in enumerate(notes) if note[0]]
    if not failed:
        return None
    first = notes[failed[0]]
    words = first[1:].rstrip(b"\0").decode(errors="replace")
    said = words if first[0] in (Verdict.REFUSED, Verdict.NUMBERS, Verdict.UNFIT) else f"rank {failed[0]}: {words}"
    return Failure(Verdict(first[0]), said, everywhere=len(failed) == tp.size)


def check_whole(failure: Failure) -> None:
    """After an update: ranks that applied it and one that did not have no common state to go on from."""
    if not failure.everywhere:
        raise WorkerError(f"an update was applied on some ranks and not on others: {failure.words}")
