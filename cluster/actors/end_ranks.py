"""The end of a group's processes: asked first, where they hear it, then killed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ray

HEARD_S = 3.0
"""How long a rank may take to hear that it is to end: one that is frozen, or was signalled itself, does not hear it."""


def end_ranks(actors: Sequence[Any], runs: Sequence[ray.ObjectRef], life: int, timeout_s: float, ask: bool) -> None:
    """Those that are asked and hear it have `timeout_s` to end by themselves."""
    if ask and runs:
        asked = {actor.stop.remote(life): run for actor, run in zip(actors, runs, strict=True)}
        heard, _ = ray.wait(list(asked), num_returns=len(asked), timeout=HEARD_S)
        _await([asked[answer] for answer in heard], timeout_s)
    for actor in actors:
        ray.kill(actor)
    _await(runs, timeout_s)


def _await(runs: Sequence[ray.ObjectRef], timeout_s: float) -> None:
    if runs:
        ray.wait(list(runs), num_returns=len(runs), timeout=timeout_s, fetch_local=False)
