"""The end of a group's processes: asked first, where they hear it, then killed."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import ray

HEARD_S = 3.0
"""How long a rank may take to hear that it is to end: one that is frozen, or was signalled itself, does not hear it."""


def end_ranks(
    actors: Sequence[Any], runs: Sequence[ray.ObjectRef], life: int, timeout_s: float, pids: Sequence[int | None] | None
) -> None:
    """Those that are asked (where `pids` is given: of those on this machine) and hear it have `timeout_s` to end by
    themselves."""
    if pids is not None:
        _ask(actors, runs, life, timeout_s, pids)
    for actor in actors:
        ray.kill(actor)
    _await(runs, timeout_s)


def _ask(
    actors: Sequence[Any], runs: Sequence[ray.ObjectRef], life: int, timeout_s: float, pids: Sequence[int | None]
) -> None:
    asked = {actor.stop.remote(life): rank for rank, actor in enumerate(actors)}
    heard, unheard = ray.wait(list(asked), num_returns=len(asked), timeout=HEARD_S)
    for pid in [pids[asked[answer]] for answer in unheard]:
        if pid is not None:  # Ray would ask it once more, and wait
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
    _await([runs[asked[answer]] for answer in heard], timeout_s)


def _await(runs: Sequence[ray.ObjectRef], timeout_s: float) -> None:
    if runs:
        ray.wait(list(runs), num_returns=len(runs), timeout=timeout_s, fetch_local=False)
