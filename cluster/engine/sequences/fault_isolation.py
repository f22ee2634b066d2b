"""An exception that one request's part of a step raised ends that request alone.

Only rank 0 has such parts: drawing, ranking, reading, committing, planning. They come after the step's collectives or
before the next one's, so the other ranks need not know; they go on with the next plan, in which the request is missing.
What the group itself raises (a collective, a worker) is never one request's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Many
from contextlib import contextmanager
from typing import TypeVar

from cluster.engine.sequences.sequence import Sequence
from parallel.errors import CollectiveError, TpError, WorkerError

T = TypeVar("T")
A = TypeVar("A")

log = logging.getLogger(__name__)

GROUP_FAULTS = (CollectiveError, WorkerError)


class RequestFault(TpError):
    """Raised where something of this sequence failed, out of the work on several; the cause is chained."""

    def __init__(self, sequence: Sequence, cause: Exception) -> None:
        super().__init__(reason(cause))
        self.sequence, self.cause = sequence, cause


def reason(error: Exception) -> str:
    """What the request's answer says."""
    return f"this request could not be computed, others went on: {type(error).__name__}: {error}"


@contextmanager
def blamed_on(sequence: Sequence) -> Iterator[None]:
    """What is raised inside is this sequence's fault, unless the group raised it."""
    try:
        yield
    except GROUP_FAULTS:
        raise
    except Exception as error:
        raise RequestFault(sequence, error) from error


def each_alone(work: Callable[[Many[T]], list[A]], items: Many[T], failed: Callable[[str], A]) -> list[A]:
    """The work on all items at once; where it raises, on each by itself, so that only those that raise again fail.
    The work on an item must not depend on the others.
    """
    try:
        return work(items)
    except GROUP_FAULTS:
        raise
    except Exception as error:
        if len(items) == 1:
            log.exception("a request failed by itself")
            return [failed(reason(error))]
        return [answer for item in items for answer in each_alone(work, [item], failed)]
