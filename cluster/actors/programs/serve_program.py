"""From a ServeSpec to the program of a rank, on the rank itself: what that needs is imported there, and not before.

It pickles as the values do and is what a WorkerGroup is given.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cluster.actors.group.placement import Place
from cluster.actors.programs.serve_spec import ServeSpec

if TYPE_CHECKING:
    from cluster.actors.group.worker import Phases, Program


@dataclass(frozen=True, kw_only=True)
class ServeProgram(ServeSpec):
    """A serving rank."""

    def __call__(self, place: Place, phases: Phases) -> Program:
        """Makes a rank's program; the imports it needs are made on the rank."""
        with phases("imports"):
            from cluster.actors.programs.serve_rank import ServeRank
        return ServeRank(self, place, phases)
