"""Which of several samples are the best: those with the likeliest tokens on average, so length decides nothing.

The engine draws `best_of` samples like any others; whoever puts the answer together (cluster.engine.generate, the
front-end) chooses, because only it knows where a stop string ended a sample.
"""

from __future__ import annotations

from collections.abc import Sequence


def mean_logprob(logprobs: Sequence[float], stop_logprob: float | None) -> float | None:
    """Of a sample's tokens and of the stop token that is not among them; None where nothing was generated."""
    values = [*logprobs, *(() if stop_logprob is None else (stop_logprob,))]
    return sum(values) / len(values) if values else None


def best_places(scores: Sequence[float | None], count: int) -> list[int]:
    """The places of the `count` highest scores, best first; of equal ones the first, and those without one last."""
    return sorted(range(len(scores)), key=lambda place: (scores[place] is None, -(scores[place] or 0.0), place))[:count]
