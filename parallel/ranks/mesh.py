"""From a rank number to process groups: rendezvous, the tp x dp layout, and the transport each group gets.

Tensor-parallel ranks are neighbours: rank = dp_index * tp + tp_index. Ranks of one host that can map the same memory
talk through `ShmComm`; other CPU ranks through gloo; CUDA ranks through nccl, with gloo beside it for commands. The
process groups belong to the returned `Groups`; torch.distributed's global default group is neither used nor touched, so
a process may meet its peers again at another address after a failure. Nothing here reads the environment.
"""

from __future__ import annotations

import logging
import socket
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal
from urllib.parse import urlparse

import torch
import torch.distributed as dist

from parallel.errors import CollectiveError, ConfigError, KernelsWithheld, NativeUnavailable, TpError
from parallel.native.compiled.library import library, withhold
from parallel.ranks.comm import Comm, waited
from parallel.ranks.group import Group, Numerics
from parallel.ranks.machine_check import agree, cpu_kind
from parallel.ranks.process_group import Channels, TorchComm
from parallel.ranks.rendezvous_store import KeyedStore
from parallel.ranks.shared_memory import ShmComm
from parallel.ranks.shared_segment import memory_identity, share

log = logging.getLogger(__name__)
Transport = Literal["auto", "shm", "gloo", "nccl"]
LINGER_S = 2.0
GLOO_COST = (
    "an all-reduce of 16 KB takes about 110 us over gloo and 2 us through shared memory, "
    "a decode step of a small model two to four times as long"
)


@dataclass(frozen=True)
class Groups:
    """What one rank belongs to: its tensor-parallel and its data-parallel group, and its place among all ranks."""

    tp: Group
    dp: Group
    rank: int = 0
    world: int = 1
    store: dist.Store | None = None  # rank 0's is the one the others still read: it lives as long as the groups
    meeting: KeyedStore | None = None  # what `store` is a part of, where the ranks met over a network

    @property
    def collective_seconds(self) -> float:
        """How long this rank was in collectives so far, without waiting for commands."""
        return waited(self.tp.comm) + waited(self.dp.comm)

    def close(self) -> None:
        for group in (self.tp, self.dp):
            if group.comm is not None:
                group.comm.close()
        if self.meeting is not None:
            self.meeting.close()
        withhold(None)  # what these ranks agreed on ends with them


@dataclass(frozen=True, kw_only=True)
class Wiring:
    """How the groups of a mesh are connected."""

    device: torch.device = torch.device("cpu")
    timeout_s: float = 30.0
    start_timeout_s: float = 120.0
    transport: Transport = "auto"
    hostname: str | None = None  # this rank's own address, as its peers reach it; None lets gloo choose
    key: bytes = field(default=b"", repr=False)  # which the ranks prove to each other where they meet over a network


def check_mesh(rank: int, world: int, tp: int, dp: int) -> None:
    """Refuses a layout that does not use every rank exactly once."""
    if tp < 1 or dp < 1:
        raise ConfigError(f"tp={tp}, dp={dp}: both sizes must be at least 1")
    if tp * dp != world:
        raise ConfigError(
            f"tp={tp} x dp={dp} needs {tp * dp} ranks, {world} were started; make tp x dp equal to the number of ranks"
        )
    if not 0 <= rank < world:
        raise ConfigError(f"rank {rank} is outside 0..{world - 1}; number the {world} ranks from 0")


def init_groups(
    rank: int = 0,
    world: int = 1,
    tp: int = 1,
    dp: int = 1,
    address: str | None = None,
    *,
    wiring: Wiring = Wiring(),
    numerics: Numerics = "invariant",
) -> Groups:
    """Meets all ranks at `address` (tcp://HOST:PORT of rank 0, or file:///PATH) and connects this rank's groups."""
    check_mesh(rank, world, tp, dp)
    if world == 1:
        return Groups(Group.single(numerics), Group.single(numerics))
    if address is None:
        raise ConfigError(
            f"{world} ranks need an address to meet at; give tcp://HOST:PORT, a free port on rank 0's host"
        )
    store, meeting = _rendezvous(address, rank, world, wiring)
    wiring = _with_hostname(wiring, address)
    dp_index, tp_index = divmod(rank, tp)
    try:
        if wiring.device.type == "cpu":
            store.set_timeout(timedelta(seconds=wiring.start_timeout_s))
            agree(store, rank, world, numerics, library, cpu_kind())
        tp_group = connect(dist.PrefixStore(f"tp{dp_index}", store), tp_index, tp, wiring, numerics)
        dp_group = connect(dist.PrefixStore(f"dp{tp_index}", store), dp_index, dp, wiring, numerics)
    except BaseException as error:
        if isinstance(error, TpError):
            _linger(store, rank, world)
        if meeting is not None:
            meeting.close()
        raise
    return Groups(tp_group, dp_group, rank, world, store, meeting)


def connect(
    store: dist.Store, rank: int, size: int, wiring: Wiring = Wiring(), numerics: Numerics = "invariant"
) -> Group:
    """One group over a store that is its alone; all its ranks call this."""
    if (wiring.transport == "nccl") != (wiring.device.type == "cuda") and wiring.transport != "auto":
        raise ConfigError(
            f"transport {wiring.transport!r} does not serve device {wiring.device}; "
            "choose 'auto', or 'nccl' for cuda, or 'shm' or 'gloo' for cpu"
        )
    if wiring.device.type == "cuda" and wiring.device.index is None:
        raise ConfigError(f"device {wiring.device} names no GPU, and a rank has one; give its index: cuda:0")
    if size == 1:
        return Group.single(numerics)
    store.set_timeout(timedelta(seconds=wiring.start_timeout_s))
    comm: Comm
    if wiring.device.type == "cuda" or wiring.transport == "gloo" or not _all_share_memory(store, rank, size, wiring):
        comm = _torch_comm(store, rank, size, wiring)
    else:
        comm = ShmComm.meet(store, rank, size, wiring.timeout_s)
        comm.store = store  # rank 0's must answer for as long as any rank may still be starting
    return Group(rank, size, comm, numerics)


def _rendezvous(address: str, rank: int, world: int, wiring: Wiring) -> tuple[dist.Store, KeyedStore | None]:
    """The store of these ranks, and the KeyedStore below it: over a network only who has the key is let in, in a
    folder who may read it.
    """
    limit, parts = timedelta(seconds=wiring.start_timeout_s), urlparse(address)
    try:
        if parts.scheme == "tcp":
            if not wiring.key:
                raise ConfigError(f"ranks that meet at {address} need a key that only they know; give Wiring(key=...)")
            meeting = KeyedStore(str(parts.hostname), parts.port or 0, wiring.key, limit, serve=rank == 0)
            return dist.PrefixStore("tp-decoders", meeting), meeting
        store, _, _ = next(dist.rendezvous(address, rank, world, timeout=limit))
    except ConfigError:
        raise
    except (OSError, RuntimeError, ValueError) as error:
        raise CollectiveError(
            f"rank {rank} of {world} could not meet the others at {address} within {wiring.start_timeout_s:g} s "
            f"({str(error).splitlines()[0]}); check that rank 0 runs there and that the port is free and reachable"
        ) from error
    return dist.PrefixStore("tp-decoders", store), None


def _linger(store: dist.Store, rank: int, world: int) -> None:
    """After a failure: rank 0, whose process hosts the store, stays until the others have read in it why."""
    try:
        store.set(f"failed/{rank}", "")
        if rank == 0:
            store.wait([f"failed/{other}" for other in range(world)], timedelta(seconds=LINGER_S))
    except RuntimeError:
        log.debug("not all ranks learned of the failure within %g s", LINGER_S)


def _with_hostname(wiring: Wiring, address: str) -> Wiring:
    """With the address of the interface that leads to rank 0: gloo guesses wrong where a host's name is a loopback."""
    parts = urlparse(address)
    if wiring.hostname is not None or parts.scheme != "tcp" or parts.hostname is None:
        return wiring
    family, _, _, _, target = socket.getaddrinfo(parts.hostname, parts.port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(target)  # sends nothing: asks the routing table
        own = str(probe.getsockname()[0])
    return Wiring(**{**vars(wiring), "hostname": own})


def _all_share_memory(store: dist.Store, rank: int, size: int, wiring: Wiring) -> bool:
    """Whether every rank sits on the same memory and can load the kernels; says why not, and what that costs."""
    try:
        library()
        note = f"ok {memory_identity()}"
    except KernelsWithheld as error:  # another rank's reason
        note = str(error)
    except (NativeUnavailable, OSError) as error:  # OSError: a system without /proc
        note = f"rank {rank}: {str(error).splitlines()[0]}"
    notes = share(store, "memory", rank, size, note)
    reasons = list(dict.fromkeys(text for text in notes if not text.startswith("ok ")))
    if not reasons and len(set(notes)) > 1:
        reasons = ["the ranks are on different hosts"]
    if not reasons:
        return True
    if wiring.transport == "shm":
        raise ConfigError(f"transport 'shm' is impossible here ({'; '.join(reasons)}); choose 'auto' or 'gloo'")
    if rank == 0:
        log.warning("%d ranks talk over gloo, not shared memory (%s): %s", size, "; ".join(reasons), GLOO_COST)
    return False


def _torch_comm(store: dist.Store, rank: int, size: int, wiring: Wiring) -> TorchComm:
    control = _gloo(dist.PrefixStore("gloo", store), rank, size, wiring)
    data = control
    if wiring.device.type == "cuda":
        torch.cuda.set_device(wiring.device)
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timedelta(seconds=wiring.timeout_s)
        data = dist.ProcessGroupNCCL(dist.PrefixStore("nccl", store), rank, size, options)
    channels = Channels(
        data=data, control=control, store=store, device=wiring.device, verify=wiring.device.type == "cpu"
    )
    return TorchComm(rank, size, channels, wiring.timeout_s)


def _gloo(store: dist.Store, rank: int, size: int, wiring: Wiring) -> Any:
    options: Any = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._timeout = timedelta(seconds=wiring.timeout_s)
    if wiring.hostname is None:
        options._devices = [dist.ProcessGroupGloo.create_default_device()]
    else:
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=wiring.hostname)]
    return dist.ProcessGroupGloo(store, rank, size, options)
