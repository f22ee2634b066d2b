"""A worker group that outlives its owner's death: the next owner finds its ranks at work and takes them over.

It starts, heals and ends like any other. What is different: its ranks are detached and named, hold a lease that is
renewed here (detached_actors.py), and one that was taken over is watched through a call of the new owner's own.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayError

from cluster.actors.group.detached_actors import NAMESPACE, DetachedOptions, DetachedRanks, end_leftovers
from cluster.actors.group.placement import PlacementConfig, Share
from cluster.actors.group.placement_group import Bundles, Tell
from cluster.actors.group.root_cause import describe
from cluster.actors.group.worker import Lease, MakeProgram, Ready
from cluster.actors.group.worker_group import ANSWER_S, WorkerGroup
from cluster.supervision import supervised
from parallel.errors import WorkerError

log = logging.getLogger(__name__)
MOST_RENEW_S = 5.0


class DetachedGroup(WorkerGroup):
    """`start` it, or `adopt` what an owner before this one left; `close` ends the ranks, the owner's death does not."""

    def __init__(
        self,
        make: MakeProgram,
        size: int,
        device: str = "cpu",
        config: PlacementConfig | None = None,
        share: Share | None = None,
        *,
        detached: DetachedOptions,
        moved: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(make, size, device, config, share)
        self._detached = detached
        self._moved = moved  # called when `whereabouts` has changed
        self.found = False
        """Whether there are ranks to be found."""
        self._names = [""] * size
        self._bundles = Bundles(size, device, self.config, self._closing, detached.name)

    def start(self, on_fault: Callable[[str], None] | None = None) -> list[Ready]:
        """Anew; what is left of an earlier group of this name is ended first."""
        end_leftovers(self._detached.name)
        self._begin_renewing()
        return self._told(super().start(on_fault))

    def rebuild(self, tell: Tell = log.warning, make: MakeProgram | None = None, keep: bool = True) -> list[Ready]:
        return self._told(super().rebuild(tell, make, keep))

    def _told(self, ready: list[Ready]) -> list[Ready]:
        self.found = True
        self._moved()
        return ready

    def adopt(self, left: DetachedRanks) -> list[Ready]:
        """Takes over the ranks of an owner that is gone, which go on as they are; WorkerError where one does not."""
        try:
            self._actors = [ray.get_actor(name, namespace=NAMESPACE) for name in left.actors]
            asked = [actor.standing.remote(left.life) for actor in self._actors]
            self._ready = ray.get(asked, timeout=ANSWER_S)
        except (ValueError, RayError, WorkerError) as error:
            self._actors = []
            raise WorkerError(f"the ranks that were left cannot be taken over: {describe(error)}") from error
        self._names, self._life = list(left.actors), left.life
        self._bundles.take_over(left.placement, left.bundles)
        self._places = [ready.place for ready in self._ready]
        self._runs = [actor.watch.remote(self._life) for actor in self._actors]
        self._begin_renewing()
        self._begin_watch()
        self.found = True
        return self._ready

    def forgo(self) -> None:
        """Lets go of what was taken over, without ending it."""
        self._closing.set()

    @property
    def whereabouts(self) -> DetachedRanks:
        """For the next owner, after each start and rebuild."""
        bundles = self._bundles
        return DetachedRanks(
            actors=tuple(self._names), placement=bundles.placement, bundles=bundles.of_rank, life=self._life
        )

    def _listen(self, node: str) -> str | None:
        """To the node's network: the server that comes after this one may be elsewhere."""
        return None

    def _terms(self, rank: int) -> tuple[dict[str, Any], Lease | None]:
        name = f"{self._detached.name}/{rank}-{secrets.token_hex(4)}"  # Ray frees a name only after its actor's end
        self._names[rank] = name
        return self._detached.options(name), self._detached.lease(self._bundles.placement)

    def _begin_renewing(self) -> None:
        supervised("worker-group-leases", self._renew, lambda error: self._fail(f"leases are not renewed: {error!r}"))

    def _renew(self) -> None:
        """While this process lives, whatever else it waits for. What Ray cannot do now it is asked again next time."""
        while not self._closing.wait(min(self._detached.orphan_timeout_s / 5, MOST_RENEW_S)):
            for actor in list(self._actors):
                try:
                    actor.renew.remote()
                except RayError as error:
                    log.warning("a rank's lease was not renewed: %s", describe(error))
