"""Who is waited for after a fault."""

from __future__ import annotations

from pathlib import Path

import pytest
import ray

from cluster.actors.group.worker_group import WorkerGroup
from tests.cluster.actors.group.fake_program import MakeFake


def test_no_cuda_rank_is_waited_for_as_none_is_ever_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that lost a peer is stuck in a collective until its process ends, so its state is lost with it."""

    def waited(*args: object, **limits: object) -> None:
        raise AssertionError("the group waits for ranks that cannot come back")

    monkeypatch.setattr(ray, "wait", waited)
    assert WorkerGroup(MakeFake(folder=str(tmp_path)), 2, "cuda")._survivors() == []
    with pytest.raises(AssertionError, match="cannot come back"):
        WorkerGroup(MakeFake(folder=str(tmp_path)), 2, "cpu")._survivors()
