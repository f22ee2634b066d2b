"""Which form of the weights a serving rank loads."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.actors.group.worker import Phases
from cluster.actors.programs import serve_rank
from cluster.actors.programs.serve_spec import ParallelConfig, ServeSpec


@pytest.mark.parametrize("trains", [False, True])
def test_only_a_rank_that_trains_keeps_plain_weights(trains: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(serve_rank, "load", lambda *_, **how: asked.update(how))
    monkeypatch.setattr(serve_rank, "reading", lambda *_: (None, None))
    spec = ServeSpec(model="anything", authkey=b"0123456789abcdef", parallel=ParallelConfig())
    spec = replace(spec, training=replace(spec.training, enabled=trains))
    place: Any = SimpleNamespace(rank=0)
    groups: Any = SimpleNamespace(tp=None)
    serve_rank.ServeRank(spec, place, Phases())._load(None, groups)
    assert asked["packed"] is not trains
