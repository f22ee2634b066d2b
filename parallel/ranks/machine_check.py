"""What the machines of a group's ranks must have in common to give the same bits: native kernels, and the kind of CPU.

Decided when the ranks meet, for all of them alike, whatever transport they talk over. A rank without kernels: none uses
them. Another kind of CPU: refused with numerics "invariant", whose bits are those of one kind; a warning with "fast".
"""

from __future__ import annotations

import json
import logging
import platform
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from parallel.errors import ConfigError, NativeUnavailable
from parallel.native.compiled import instruction_set
from parallel.native.compiled.library import withhold
from parallel.ranks.group import Numerics
from parallel.ranks.shared_segment import share

log = logging.getLogger(__name__)
VECTOR = ("sse4", "avx", "fma", "f16c", "amx", "asimd", "sve", "bf16", "fphp", "fcma", "i8mm")
"""How the names of those features of a CPU begin that decide which instructions kernels use."""


def cpu_kind() -> list[str]:
    """Architecture, what torch makes of it, what the kernels are compiled for and sum in, and vector features."""
    features: list[str] = []
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("flags", "Features"):
                features = sorted(word for word in value.split() if word.startswith(VECTOR))
                break
    except OSError:  # no Linux
        features = [platform.processor()]
    kernels = f"kernels-{instruction_set.chosen()}-{instruction_set.BFLOAT16_ORDER}"
    return [platform.machine(), f"torch-{torch.backends.cpu.get_cpu_capability()}", kernels, *features]


def agree(
    store: dist.Store, rank: int, size: int, numerics: Numerics, load: Callable[[], object], kind: list[str]
) -> None:
    """All ranks call this, each with its kind of CPU and with what loads its kernels."""
    withhold(None)
    try:
        load()
        missing = None
    except NativeUnavailable as error:
        missing = f"rank {rank}: {str(error).splitlines()[0]}"
    notes = [json.loads(note) for note in share(store, "machine", rank, size, json.dumps([missing, kind]))]
    _check_kinds([kind for _, kind in notes], numerics, rank)
    lacking = [reason for reason, _ in notes if reason is not None]
    if lacking:  # also where all lack them: none may find them later on its own
        if rank == 0 and len(lacking) < size:
            log.warning("no rank uses the native kernels, which are slower to do without: %s", "; ".join(lacking))
        withhold("; ".join(lacking))


def _check_kinds(kinds: list[list[str]], numerics: Numerics, rank: int) -> None:
    for other, kind in enumerate(kinds):
        if kind == kinds[0]:
            continue
        ours, theirs = (sorted(set(a) - set(b)) for a, b in ((kinds[0], kind), (kind, kinds[0])))
        said = f"ranks 0 and {other} run on unlike CPUs: only rank 0 has {ours}, only rank {other} has {theirs}"
        if numerics == "invariant":
            raise ConfigError(
                f"{said}; the same bits take one kind of CPU: use hosts of one kind, or set parallel.numerics=fast"
            )
        if rank == 0:
            log.warning("%s; their results differ in the last bits", said)
        return
