"""Shared memory where a sandbox refuses one way to have it: the next one works, and is said."""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from parallel.errors import CollectiveError
from parallel.ranks import shared_segment as segment
from parallel.ranks.shared_memory import ShmComm
from parallel.ranks.shared_segment import anonymous_file
from parallel.sharding.tree import ReductionTree


def refused(*_: object) -> int:
    raise PermissionError(1, "Operation not permitted")


def test_memory_without_a_name_is_taken_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    os.close(anonymous_file(1 << 20))
    assert not caplog.records


@pytest.mark.parametrize("also", [[], [segment.SHM]])
def test_where_memfd_is_refused_the_group_meets_over_a_file_without_a_name(
    also: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = tempfile.mkstemp
    monkeypatch.setattr(os, "memfd_create", refused)
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(
        tempfile, "mkstemp", lambda prefix, dir: refused() if dir in also else real(prefix=prefix, dir=dir)
    )
    with caplog.at_level(logging.WARNING):
        comm = ShmComm.meet(dist.HashStore(), 0, 1, timeout_s=60.0)
    nodes = torch.randn(1, 5)
    assert torch.equal(comm.tree_sum(nodes, ReductionTree.over(4, 1)), nodes[0])
    comm.close()
    (said,) = (record.getMessage() for record in caplog.records)
    assert "memfd: [Errno 1] Operation not permitted" in said
    assert f"a file without a name in {tmp_path if also else segment.SHM}" in said
    assert not list(tmp_path.iterdir()), "no name is left"


def test_a_system_without_memfd_is_one_that_refuses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create")
    os.close(anonymous_file(1 << 20))


def test_a_folder_with_too_little_room_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, seen = os.posix_fallocate, []

    def full(fd: int, offset: int, nbytes: int) -> None:
        seen.append(os.readlink(f"/proc/self/fd/{fd}"))
        if not seen[-1].startswith(str(tmp_path)):
            raise OSError(28, "No space left on device")
        real(fd, offset, nbytes)

    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(os, "posix_fallocate", full)
    os.close(anonymous_file(1 << 20))
    assert len(seen) == 3


def test_where_every_way_is_refused_the_error_names_them_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "memfd_create", refused)
    monkeypatch.setattr(tempfile, "mkstemp", lambda prefix, dir: refused())
    store = dist.HashStore()
    for rank in (0, 1):
        with pytest.raises(CollectiveError, match="memfd: .*/dev/shm: .*transport 'gloo'"):
            segment.map_segment(store, rank, 1 << 20)
