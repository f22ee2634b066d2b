"""Meeting, laying out tp x dp, and choosing a transport: who is in which group, and what is refused in words."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import parallel.ranks.mesh as mesh
from parallel.errors import CollectiveError, ConfigError, NativeUnavailable
from parallel.ranks.group import Group
from parallel.ranks.mesh import Wiring, init_groups
from parallel.ranks.process_group import TorchComm
from parallel.ranks.shared_memory import ShmComm
from parallel.ranks.shared_segment import map_segment
from parallel.sharding.tree import ReductionTree
from tests.listening import listeners

Run = Callable[..., list[Any]]
WIRING = Wiring(timeout_s=60.0, start_timeout_s=60.0, key=b"of these tests")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        ((0, 4, 3, 1), "tp=3 x dp=1 needs 3 ranks, 4 were started"),
        ((0, 4, 0, 4), "tp=0, dp=4: both sizes must be at least 1"),
        ((4, 4, 2, 2), "rank 4 is outside 0..3"),
        ((-1, 4, 2, 2), "rank -1 is outside 0..3"),
    ],
)
def test_a_layout_that_does_not_fit_is_refused_with_its_numbers(layout: tuple[int, ...], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        init_groups(layout[0], layout[1], layout[2], layout[3], "tcp://127.0.0.1:1")


def test_one_rank_needs_no_process_group() -> None:
    groups = init_groups(numerics="fast")
    assert (groups.tp.size, groups.dp.size, groups.tp.comm, groups.tp.numerics) == (1, 1, None, "fast")
    groups.close()


def test_several_ranks_without_an_address_are_refused() -> None:
    with pytest.raises(ConfigError, match="need an address to meet at; give tcp://HOST:PORT"):
        init_groups(0, 2, 2, 1)


def test_a_rank_whose_peers_do_not_come_says_where_it_waited() -> None:
    port = free_port()
    with pytest.raises(CollectiveError, match=rf"rank 1 of 2 could not meet .*127.0.0.1:{port} within 1 s"):
        init_groups(1, 2, 2, 1, f"tcp://127.0.0.1:{port}", wiring=replace(WIRING, start_timeout_s=1.0))


def test_a_transport_that_does_not_serve_the_device_is_refused() -> None:
    with pytest.raises(ConfigError, match="transport 'nccl' does not serve device cpu"):
        mesh.connect(dist.HashStore(), 0, 2, replace(WIRING, transport="nccl"))
    with pytest.raises(ConfigError, match="transport 'shm' does not serve device cuda"):
        mesh.connect(dist.HashStore(), 0, 2, replace(WIRING, transport="shm", device=torch.device("cuda")))
    with pytest.raises(ConfigError, match="device cuda names no GPU, and a rank has one; give its index: cuda:0"):
        mesh.connect(dist.HashStore(), 0, 2, replace(WIRING, device=torch.device("cuda")))


def layout(group: Group, address: str, tp: int, dp: int) -> tuple[Any, ...]:
    """Where this rank stands, and the world ranks of its peers in both groups as the groups themselves tell them."""
    groups = init_groups(group.rank, group.size, tp, dp, address, wiring=WIRING)
    peers = []
    for part in (groups.tp, groups.dp):
        alone = torch.tensor([group.rank])
        peers.append(part.talk.all_gather(alone, [1] * part.size, 0).tolist() if part.size > 1 else [group.rank])
    kinds = {type(part.comm).__name__ for part in (groups.tp, groups.dp) if part.comm is not None}
    groups.close()
    return groups.tp.rank, groups.dp.rank, *peers, kinds


@pytest.mark.parametrize("scheme", ["tcp", "file"])
def test_tensor_parallel_ranks_are_neighbours(ranks: Run, scheme: str, tmp_path: Path) -> None:
    address = f"tcp://127.0.0.1:{free_port()}" if scheme == "tcp" else f"file://{tmp_path}/meet"
    assert ranks(4, layout, address, 2, 2) == [
        (0, 0, [0, 1], [0, 2], {"ShmComm"}),
        (1, 0, [0, 1], [1, 3], {"ShmComm"}),
        (0, 1, [2, 3], [0, 2], {"ShmComm"}),
        (1, 1, [2, 3], [1, 3], {"ShmComm"}),
    ]


def meet_again(group: Group, addresses: list[str]) -> list[float]:
    """The same processes meet at one address after another, as after a failure."""
    sums = []
    for address in addresses:
        groups = init_groups(group.rank, group.size, group.size, 1, address, wiring=WIRING)
        sums.append(groups.tp.talk.sum(torch.tensor([float(group.rank + 1)])).item())
        groups.close()
    assert not dist.is_initialized()
    return sums


def test_processes_meet_again_at_another_address(ranks: Run) -> None:
    assert ranks(2, meet_again, [f"tcp://127.0.0.1:{free_port()}" for _ in range(3)]) == [[3.0] * 3] * 2


def without_a_compiler(group: Group, address: str, transport: str) -> tuple[str, str, list[str]]:
    """Rank 1 cannot build the kernels."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    mesh.log.addHandler(handler)
    real = mesh.library
    try:
        if group.rank == 1:
            mesh.library = no_library  # type: ignore[assignment]
        wiring = replace(WIRING, transport=transport)  # type: ignore[arg-type]
        groups = init_groups(group.rank, 2, 2, 1, address, wiring=wiring)
        nodes = torch.full((1, 3), float(group.rank))
        total = groups.tp.talk.tree_sum(nodes, ReductionTree.over(2, 2))
        groups.close()
        return type(groups.tp.comm).__name__, str(total.tolist()), said
    except ConfigError as error:
        return "refused", str(error), said
    finally:
        mesh.library = real
        mesh.log.removeHandler(handler)


def no_library() -> None:
    raise NativeUnavailable("no C++ compiler (g++ or c++) is on PATH")


def test_without_a_compiler_on_one_rank_all_use_gloo_and_are_told_what_it_costs(ranks: Run) -> None:
    first, second = ranks(2, without_a_compiler, f"tcp://127.0.0.1:{free_port()}", "auto")
    assert first[:2] == second[:2] == (TorchComm.__name__, "[1.0, 1.0, 1.0]")
    assert len(first[2]) == 1 and not second[2]
    assert "rank 1: no C++ compiler" in first[2][0] and "110 us over gloo" in first[2][0]


def test_asking_for_shared_memory_where_it_is_impossible_is_refused(ranks: Run) -> None:
    for kind, said, _ in ranks(2, without_a_compiler, f"tcp://127.0.0.1:{free_port()}", "shm"):
        assert kind == "refused" and "'shm' is impossible here (rank 1: no C++ compiler" in said


def two_hosts(group: Group, address: str) -> str:
    real = mesh.memory_identity
    try:
        mesh.memory_identity = lambda: f"host of rank {group.rank}"
        groups = init_groups(group.rank, 2, 2, 1, address, wiring=WIRING)
        groups.tp.talk.barrier()
        groups.close()
        return type(groups.tp.comm).__name__
    finally:
        mesh.memory_identity = real


def test_ranks_of_different_hosts_use_gloo(ranks: Run) -> None:
    assert ranks(2, two_hosts, f"tcp://127.0.0.1:{free_port()}") == [TorchComm.__name__] * 2


def absent_peer(group: Group, address: str) -> str:
    """Rank 1 meets the others but never says what machine it is on."""
    if group.rank == 1:
        store = mesh._rendezvous(address, 1, 2, WIRING)[0]
        store.wait(["machine/0"])
        return ""
    try:
        init_groups(0, 2, 2, 1, address, wiring=replace(WIRING, start_timeout_s=4.0))
    except CollectiveError as error:
        return str(error)
    return "met"


def test_a_rank_missing_from_a_group_is_named(ranks: Run) -> None:
    assert "ranks [1] of 2 did not come" in ranks(2, absent_peer, f"tcp://127.0.0.1:{free_port()}")[0]


def test_too_little_memory_is_told_to_every_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(fd: int, offset: int, nbytes: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    store = dist.HashStore()
    for rank in (0, 1):
        with pytest.raises(CollectiveError, match="rank 0 cannot reserve 16 MiB of shared memory .*No space left"):
            map_segment(store, rank, 16 << 20)


def test_a_group_of_one_over_shared_memory_works() -> None:
    comm = ShmComm.meet(dist.HashStore(), 0, 1, timeout_s=60.0)
    nodes = torch.randn(1, 5)
    assert torch.equal(comm.tree_sum(nodes, ReductionTree.over(4, 1)), nodes[0])
    assert comm.broadcast_bytes(b"x" * 100_000) == b"x" * 100_000
    comm.close()


def what_listens(group: Group, address: str, hosts: list[str] | None, tp: int) -> tuple[set[str], float]:
    """The addresses of this rank's listening sockets over gloo, and a sum that all took part in."""
    before = set(listeners([os.getpid()]))
    wiring = replace(WIRING, transport="gloo", hostname=hosts[group.rank] if hosts else None)
    groups = init_groups(group.rank, group.size, tp, group.size // tp, address, wiring=wiring)
    total = torch.tensor([1.0])
    for part in (groups.tp, groups.dp):
        total = part.talk.sum(total) if part.size > 1 else total
    found = set(listeners([os.getpid()])) - before
    groups.tp.talk.barrier()
    groups.close()
    return {each.host for each in found}, total.item()


@pytest.mark.parametrize(("world", "tp"), [(3, 3), (4, 2)])
def test_ranks_of_one_machine_listen_to_it_alone(ranks: Run, world: int, tp: int) -> None:
    found = ranks(world, what_listens, f"tcp://127.0.0.1:{free_port()}", None, tp)
    assert found == [({"127.0.0.1"}, float(world))] * world


def test_ranks_listen_on_the_address_they_are_reached_at(ranks: Run) -> None:
    hosts = ["127.0.0.1", "127.0.0.2"]
    found = ranks(2, what_listens, f"tcp://127.0.0.1:{free_port()}", hosts, 2)
    assert found == [({host}, 2.0) for host in hosts]
