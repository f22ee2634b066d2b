"""A group's reservation waits for nodes that are still joining, as long as it was told to; on a Ray that is played."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any

import pytest

from cluster.actors.group import placement_group
from cluster.actors.group.placement import PlacementConfig
from cluster.actors.group.placement_group import Bundles
from parallel.errors import ConfigError


class Placed:
    """A placement group that Ray places at once."""

    def wait(self, timeout: float) -> bool:
        return True


@pytest.fixture
def requested(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """By what strategy something was reserved."""
    asked: list[str] = []

    def request(parts: Sequence[dict[str, float]], strategy: str) -> Placed:
        asked.append(f"{len(parts)} by {strategy}")
        return Placed()

    monkeypatch.setattr(placement_group, "placement_group", request)
    monkeypatch.setattr(placement_group, "PROBE_EVERY_S", 0.01)
    return asked


def sees(monkeypatch: pytest.MonkeyPatch, *counts: int) -> None:
    """Ray tells of so many nodes of one core, one answer after the other; the last one stays."""
    left = list(counts)

    def nodes() -> list[dict[str, Any]]:
        count = left.pop(0) if len(left) > 1 else left[0]
        return [{"Alive": True, "Resources": {"CPU": 1}}] * count

    monkeypatch.setattr(placement_group.ray, "nodes", nodes)


def reservation(join_timeout_s: float, closing: threading.Event | None = None) -> Bundles:
    config = PlacementConfig(strategy="STRICT_SPREAD", join_timeout_s=join_timeout_s)
    return Bundles(3, "cpu", config, closing or threading.Event())


def test_nodes_that_join_in_time_are_waited_for(monkeypatch: pytest.MonkeyPatch, requested: list[str]) -> None:
    sees(monkeypatch, 1, 2, 3)
    reservation(30.0).reserve()
    assert requested == ["3 by STRICT_SPREAD"]


def test_without_time_to_join_a_small_cluster_is_refused_at_once(
    monkeypatch: pytest.MonkeyPatch, requested: list[str]
) -> None:
    sees(monkeypatch, 2, 3)
    with pytest.raises(ConfigError, match=r"the cluster has 1 \+ 1"):
        reservation(0.0).reserve()
    assert requested == []


def test_nodes_that_do_not_come_are_not_waited_for_longer(
    monkeypatch: pytest.MonkeyPatch, requested: list[str]
) -> None:
    sees(monkeypatch, 2)
    began = time.monotonic()
    with pytest.raises(ConfigError):
        reservation(0.2).reserve()
    assert 0.2 <= time.monotonic() - began < 60.0 and requested == []


def test_a_group_that_is_closed_waits_no_longer(monkeypatch: pytest.MonkeyPatch, requested: list[str]) -> None:
    sees(monkeypatch, 2)
    closing = threading.Event()
    closing.set()
    with pytest.raises(ConfigError):
        reservation(3600.0, closing).reserve()
