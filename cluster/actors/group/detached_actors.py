"""Ranks that outlive the process that started them: named, found again by the next one, ended by themselves otherwise.

A group's name is its owner's to choose, the same at each start. Every process of it holds a lease that the owner
renews; one that is not renewed in time stops its program and gives the group's room back, which ends the others, too.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

from cluster.actors.group.worker import Lease

log = logging.getLogger(__name__)
NAMESPACE = "tp-decoders"


@dataclass(frozen=True, kw_only=True)
class DetachedOptions:
    """That a group is to outlive its owner, under which name, and for how long without one."""

    name: str
    orphan_timeout_s: float

    def lease(self, placement: str) -> Lease:
        return Lease(self.orphan_timeout_s, _RemovePlacement(placement))

    def options(self, name: str) -> dict[str, Any]:
        """What Ray is told of a rank's actor."""
        return {"name": name, "namespace": NAMESPACE, "lifetime": "detached"}


@dataclass(frozen=True, kw_only=True)
class DetachedRanks:
    """What the next owner needs to find a group's ranks; plain values, to be written to a file."""

    actors: tuple[str, ...]  # by rank
    placement: str
    bundles: tuple[int, ...]  # by rank
    life: int


@dataclass(frozen=True)
class _RemovePlacement:
    """On a rank: ends the whole group by giving its room back."""

    placement: str

    def __call__(self) -> None:
        remove_placement_group(found(self.placement))


def found(placement: str) -> PlacementGroup:
    """A placement group by its id, whichever process reserved it."""
    return PlacementGroup(ray.PlacementGroupID(bytes.fromhex(placement)))


def end_leftovers(name: str) -> int:
    """Ends what is left of a group of this name, of which nobody will be the owner; how many ranks that were."""
    ended = 0
    for actor in ray.util.list_named_actors(all_namespaces=True):
        if actor["namespace"] == NAMESPACE and actor["name"].startswith(f"{name}/"):
            try:
                ray.kill(ray.get_actor(actor["name"], namespace=NAMESPACE))
                ended += 1
            except (ValueError, RayError) as error:  # it ended meanwhile
                log.debug("%s: %s", actor["name"], error)
    for placement, facts in placement_group_table().items():
        if facts["name"] == name and facts["state"] != "REMOVED":
            remove_placement_group(found(placement))
    if ended:
        log.warning("%d ranks that an earlier server left on the cluster were ended", ended)
    return ended
