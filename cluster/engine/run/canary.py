"""A canary: two tokens read and one decoded on every rank, in a cache of its own, to prove that the group can answer.

It travels as a command like any other, between two steps, so it sees what a request would see and disturbs none: no
slot, no block, no draw. Every rank says what it computed and how it is. The same weights must give the same token,
finite numbers, and the same on all ranks; where they do not, the fault is said, not raised. A rank that takes no part
breaks the collective, as in a step.
"""

from __future__ import annotations

import math
import os
import socket
import struct
from functools import cached_property

import torch
from torch import Tensor

from cluster.engine.request import RankReport
from cluster.engine.run.command_stream import CANARY, Commands
from cluster.engine.run.model_runner import ModelRunner
from parallel.attention.attend import AttentionMetadata
from parallel.attention.forward_pass import Pass
from parallel.attention.kv_cache import KVCache
from parallel.ranks.comm import waited

PROMPT = 2
NAME_BYTES = 64
PACKED = struct.Struct(f"<6qd{NAME_BYTES}s")


class Canary:
    """One rank's part. On rank 0 `sing` calls the others, which `follow` (see executors.py)."""

    def __init__(self, runner: ModelRunner, commands: Commands | None = None) -> None:
        self._runner, self._commands = runner, commands
        self._known: tuple[int, int] | None = None  # weight_version, and what was decoded with it
        self.count = 0
        self.reports: tuple[RankReport, ...] = ()
        self.fault = ""

    def sing(self) -> None:
        """Rank 0: one canary through every rank; `reports` and `fault` are new then."""
        if self._commands is not None:
            self._commands.issue(CANARY)
        packed = self.follow()
        assert packed is not None, "rank 0 gathers what the ranks say"
        tokens = []
        reports = []
        for rank, row in enumerate(packed):
            token, *numbers, seconds, name = PACKED.unpack(row)
            tokens.append(token)
            reports.append(_report(rank, numbers, seconds, name))
        self.count += 1
        self.reports, self.fault = tuple(reports), self._judge(tokens)

    def traffic(self) -> dict[str, tuple[int, int]]:
        """This rank's collectives by kind: how many, and how many bytes it gave."""
        comm = self._runner.model.group.comm
        return {} if comm is None else {kind: (count, comm.byte_counts[kind]) for kind, count in comm.counts.items()}

    def waits(self) -> dict[str, float]:
        """Seconds that this rank was in collectives, by kind."""
        comm = self._runner.model.group.comm
        return {} if comm is None else dict(comm.seconds)

    def follow(self) -> list[bytes] | None:
        """On every rank at once; what all said, on rank 0."""
        return self._gather(PACKED.pack(self._decode(), *self._state()))

    def _judge(self, tokens: list[int]) -> str:
        """What is wrong with the tokens that the ranks decoded, -1 for numbers that are not finite."""
        version, token = self._runner.weight_version, tokens[0]
        if -1 in tokens:
            return f"rank {tokens.index(-1)} computes numbers that are not finite, with weight version {version}"
        if len(set(tokens)) > 1:
            return f"the ranks decode different tokens from the same weights: {tokens}"
        known, self._known = self._known, (version, token)
        if known is not None and known[0] == version and known[1] != token and self._invariant:
            self._known = known
            return f"the same prompt gave token {known[1]} before and {token} now, with weight version {version}"
        return ""

    @property
    def _invariant(self) -> bool:
        return self._runner.model.group.numerics == "invariant"

    @cached_property
    def _cache(self) -> KVCache:
        return self._runner.backend.cache(self._runner.cache.layout, 1)

    @torch.inference_mode()
    def _decode(self) -> int:
        """The token after the prompt and the next one; 0 of a model without a vocabulary; -1: not finite."""
        head = self._runner.model.head if self._runner.model.has_vocabulary else None
        token = self._read([0] * PROMPT, 0)
        if head is None or self._runner.model.config.max_positions <= PROMPT:
            return token
        next_token = self._read([max(0, token)], PROMPT)
        return -1 if token == -1 else next_token

    def _read(self, tokens: list[int], start: int) -> int:
        runner, count = self._runner, len(tokens)
        device = runner.device
        block_size = runner.cache.layout.block_size
        metadata = AttentionMetadata.build([count], [start + count], [[0]], block_size, device)
        now = Pass.cached(runner.backend, self._cache, metadata)
        x_TD = runner.model.hidden(torch.tensor(tokens, dtype=torch.long, device=device), now)
        if not runner.model.has_vocabulary:
            return _finite(x_TD, 0)
        logits = runner.model.logits(x_TD, torch.tensor([count - 1], device=device))
        best = runner.model.head.argmax(logits)
        return _finite(best.logits, int(best.ids[0]))

    def _state(self) -> tuple[int, int, int, int, int, float, bytes]:
        comm, device = self._runner.model.group.comm, torch.device(self._runner.device)
        on_device = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        counts = (0, 0) if comm is None else (comm.counts.total(), comm.byte_counts.total())
        name = socket.gethostname().encode()[:NAME_BYTES]
        return os.getpid(), resident_bytes(), on_device, *counts, waited(comm), name

    def _gather(self, mine: bytes) -> list[bytes] | None:
        group = self._runner.model.group
        if group.comm is None:
            return [mine]
        given = torch.frombuffer(bytearray(mine), dtype=torch.uint8).to(self._runner.device)
        everyone = group.comm.gather(given, [len(mine)] * group.size, 0)
        return None if everyone is None else [bytes(row.tolist()) for row in everyone.cpu().split(len(mine))]


def _finite(values: Tensor, token: int) -> int:
    return token if math.isfinite(float(values[-1].float().sum())) else -1


def _report(rank: int, numbers: list[int], seconds: float, name: bytes) -> RankReport:
    pid, memory, device_memory, collectives, collective_bytes = numbers
    return RankReport(
        rank=rank, node=name.rstrip(b"\0").decode(errors="replace"), pid=pid, memory_bytes=memory,
        device_memory_bytes=device_memory, collectives=collectives, collective_bytes=collective_bytes,
        collective_seconds=seconds,
    )  # fmt: skip


def resident_bytes() -> int:
    """Memory that this process holds; 0 where the system does not tell."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
