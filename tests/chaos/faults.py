"""The kinds of faults: what each breaks, by what words the product must name it, and how it is mended.

A kind strikes a `World` and says whom it concerns. Killing, stopping, cutting off and damaging is real; which target is
hit comes from the run's seed. Waits for nothing to be noticed: that is strike.py's.
"""

from __future__ import annotations

import json
import random
import re
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cluster.training.checkpoint import latest_checkpoint
from tests.chaos.hosts import HEAD, Hosts, end, inner_pid, ranks_below, training_rank
from tests.chaos.jobs import KEEPS_STATE, Served, Training
from tests.multinode.commands import Failed

SERVING, TRAINING = "serving", "training"
FILLER = "filler"


@dataclass
class World:
    """Everything there is to break."""

    hosts: Hosts
    served: Served
    training: Training
    disk: Path | None  # a small file system that holds the training run's folder, where one could be made
    places: dict[int, tuple[str, int]] = field(default_factory=dict)  # of serving ranks: host, and its process id there

    def ranks(self, job: str) -> list[tuple[int, int, int]]:
        """Rank (-1: not known), node and process of every rank that is there."""
        found = []
        for number in self.hosts.numbers:
            raylet = self.hosts.raylet(number)
            for pid in ranks_below(raylet) if raylet else []:
                rank = training_rank(pid, self.training.runs)
                if job == TRAINING and rank is not None:
                    found.append((rank, number, pid))
                elif job == SERVING and rank is None:
                    found.append((self._serving_rank(number, pid), number, pid))
        return found

    def _serving_rank(self, number: int, pid: int) -> int:
        here = (self.hosts.name(number), inner_pid(pid))
        return next((rank for rank, place in self.places.items() if place == here), -1)


@dataclass
class Strike:
    """One fault: what was hit, whom it concerns, and the words that name it (none: its supervisor sees it at once)."""

    target: str
    words: dict[str, str | None]
    mend: Callable[[], None] | None = None  # once it was named
    nodes: Sequence[int] = ()  # whose Ray has to be started again
    at_restart: bool = False  # named when it is read again, not when it happens


Kind = Callable[[World, random.Random], Strike]


def named(world: World, ranks: Sequence[tuple[int, int, int]]) -> str:
    """Any of these ranks, on its node, and a cause."""
    return "|".join(
        rf"rank {rank if rank >= 0 else '[0-9]+'} on {re.escape(world.hosts.node(node))}: .+" for rank, node, _ in ranks
    )


def strike_rank(job: str, number: signal.Signals) -> Kind:
    def kind(world: World, rng: random.Random) -> Strike:
        victim = rng.choice(sorted(world.ranks(job)))
        end(victim[2], number)
        return Strike(f"rank {victim[0]} on {world.hosts.node(victim[1])}", {job: named(world, [victim])})

    return kind


def strike_raylet(number: signal.Signals) -> Kind:
    def kind(world: World, rng: random.Random) -> Strike:
        node, words = a_node(world, rng)
        raylet = world.hosts.raylet(node)
        assert raylet is not None, "a node has one"
        end(raylet, number)
        mend = None if number == signal.SIGKILL else lambda: end(raylet, signal.SIGCONT)
        return Strike(f"the raylet of {world.hosts.node(node)}", words, mend, [node])

    return kind


def cut_off(world: World, rng: random.Random) -> Strike:
    node, words = a_node(world, rng)
    world.hosts.link(node, "down")
    return Strike(world.hosts.node(node), words, lambda: world.hosts.link(node, "up"), [node])


def a_node(world: World, rng: random.Random) -> tuple[int, dict[str, str | None]]:
    """A node with ranks that is not the head, and whom its loss concerns."""
    here = {job: world.ranks(job) for job in (SERVING, TRAINING)}
    found = sorted({node for ranks in here.values() for _, node, _ in ranks} - {HEAD})
    if not found:
        raise Failed("all ranks are on the head")
    node = rng.choice(found)
    on_it = {job: [rank for rank in ranks if rank[1] == node] for job, ranks in here.items()}
    return node, {job: named(world, ranks) for job, ranks in on_it.items() if ranks}


def kill_front_end(world: World, rng: random.Random) -> Strike:
    world.served.kill()
    return Strike("tp-decoders serve", {SERVING: None})


def kill_train_command(world: World, rng: random.Random) -> Strike:
    world.training.kill()
    return Strike("tp-decoders train", {TRAINING: None})


def fill_disk(world: World, rng: random.Random) -> Strike:
    """The disk under the training run's folder, to its last byte."""
    assert world.disk is not None, "there is one"
    filler = world.disk / FILLER
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1 << 16))
        except OSError:
            pass
    words = r"rank \d+ on \S+: .*No space left on device"
    return Strike(str(world.disk.name), {TRAINING: words}, lambda: filler.unlink(missing_ok=True))


def corrupt_checkpoint(world: World, rng: random.Random) -> Strike:
    """A bit of the newest checkpoint's weights or moments flips, and the ranks are lost, so that it is wanted."""
    ranks = world.ranks(TRAINING)
    for _, _, pid in ranks:
        end(pid, signal.SIGSTOP)  # nothing newer is written meanwhile
    newest = latest_checkpoint(world.training.out)
    if newest is None:
        raise Failed("there is no checkpoint")
    path = rng.choice(sorted(newest.rglob("*.safetensors")))
    flip(path, tensor_byte(path, rng))
    for _, _, pid in ranks:
        end(pid)
    words = rf"{re.escape(newest.name)}.*{re.escape(path.name)}"
    return Strike(f"{path.relative_to(newest.parent)}", {TRAINING: words}, at_restart=True)


def corrupt_model(world: World, rng: random.Random) -> Strike:
    """The served model's file cannot be understood when a lost rank reads it again; then it is put right."""
    path = world.served.model / "model.safetensors"
    flip(path, 9)  # in its header
    victim = rng.choice(sorted(world.ranks(SERVING)))
    end(victim[2])
    words = rf"rank \d+ on \S+ did not start: .*{re.escape(path.name)}"
    target = f"model.safetensors, under {world.hosts.node(victim[1])}"
    return Strike(target, {SERVING: words}, lambda: flip(path, 9), at_restart=True)


def flip(path: Path, at: int) -> None:
    """One bit, in place."""
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 0x10]))


def tensor_byte(path: Path, rng: random.Random) -> int:
    """A place in the tensors' bytes."""
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
        json.loads(file.read(header))
    return rng.randrange(8 + header, path.stat().st_size)


KINDS: dict[str, tuple[int, Kind]] = {
    "kill -9 of a serving rank": (16, strike_rank(SERVING, signal.SIGKILL)),
    "SIGSTOP of a serving rank": (10, strike_rank(SERVING, signal.SIGSTOP)),
    "kill -9 of a training rank": (12, strike_rank(TRAINING, signal.SIGKILL)),
    "SIGSTOP of a training rank": (8, strike_rank(TRAINING, signal.SIGSTOP)),
    "kill -9 of a raylet": (12, strike_raylet(signal.SIGKILL)),
    "SIGSTOP of a raylet": (6, strike_raylet(signal.SIGSTOP)),
    "host cut off": (8, cut_off),
    "kill -9 of the front-end": (12, kill_front_end),
    "kill -9 of the training command": (4, kill_train_command),
    "disk full": (6, fill_disk),
    "corrupt checkpoint": (4, corrupt_checkpoint),
    "corrupt model file": (2, corrupt_model),
}
"""How many of a hundred, and how."""


def possible(world: World) -> list[str]:
    """The kinds that can strike here."""
    without = {"host cut off"} if not world.hosts.can_cut else set()
    without |= {"disk full"} if world.disk is None else set()
    without |= set() if KEEPS_STATE else {"kill -9 of the front-end"}
    return [kind for kind in KINDS if kind not in without]


def drawn(kinds: Sequence[str], count: int, rng: random.Random) -> list[str]:
    """So many faults in an order of chance: every kind in its share, none left out where there is room for all."""
    whole = sum(KINDS[kind][0] for kind in kinds)
    deck = [kind for kind in kinds for _ in range(max(1, round(KINDS[kind][0] * count / whole)))]
    rng.shuffle(deck)
    while len(deck) < count:
        deck.append(rng.choices(list(kinds), [KINDS[kind][0] for kind in kinds])[0])
    firsts = {kind: deck.index(kind) for kind in deck}
    spare = [at for at in range(len(deck)) if at not in firsts.values()]
    for at in reversed(spare[: len(deck) - count] if len(spare) >= len(deck) - count else range(count, len(deck))):
        del deck[at]
    return deck[:count]
