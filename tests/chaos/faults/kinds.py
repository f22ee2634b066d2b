"""The kinds of faults: what each breaks, by what words the product must name it, and how it is mended.

A kind strikes a `World` and says whom it concerns. Killing, stopping, cutting off and damaging is real; which target is
hit comes from the run's seed. Waits for nothing to be noticed: that is strike.py's.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from cluster.rpc.client.client import Client, ServiceError
from cluster.training.checkpoint.checkpointer import latest_checkpoint
from tests.chaos.faults.injected.sitecustomize import POISON
from tests.chaos.faults.own_head import own_head_dies
from tests.chaos.faults.threads import busiest_thread, can_trace, stop_thread
from tests.chaos.harness.hosts import HEAD, Hosts, end, inner_pid, ranks_below, training_rank, until_gone
from tests.chaos.harness.jobs import KEEPS_STATE, Served, Training
from tests.multinode.commands import Failed

SERVING, TRAINING = "serving", "training"
FILLER = "filler"
FOUR_TOKENS = {"max_new_tokens": 4}


@dataclass
class World:
    """Everything there is to break."""

    hosts: Hosts
    served: Served
    training: Training
    switches: Path  # of injected faults
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
    after: Callable[[], None] | None = None  # once it has healed
    prove: Callable[[], None] | None = None  # in a thread, once it has healed: raises Failed
    silent: bool = False  # nobody is to notice it: streams go on, health says nothing


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


def refuse_connects(world: World, rng: random.Random) -> Strike:
    """A rank is lost, and the engines that are made in its place refuse connections until the fault was named."""
    switch = world.switches / "refuse"
    switch.touch()
    victim = rng.choice(sorted(world.ranks(SERVING)))
    end(victim[2])
    words = "could not be rebuilt: cannot reach the engine"
    return Strike(f"engines after {victim}", {SERVING: words}, lambda: switch.unlink(missing_ok=True), at_restart=True)


def hang_engine(world: World, rng: random.Random) -> Strike:
    """One thread of a rank, the one that computes, stands still; all others go on."""
    victim = rng.choice(sorted(world.ranks(SERVING)))
    let_go = stop_thread(busiest_thread(victim[2]))
    return Strike(f"the engine's thread of {victim}", {SERVING: named(world, world.ranks(SERVING))}, after=let_go)


def poison_call(world: World, rng: random.Random) -> Strike:
    """A request that ends every rank that computes it: refused after its second death, and nothing else is."""
    answers: list[str] = []

    def ask() -> None:
        with Client(world.served.address, retry_seconds=0.0) as client:
            try:
                client.generate([[*POISON, *rng.choices(range(8, 60), k=4)]], stopping=FOUR_TOKENS, timeout=170)
                answers.append("an answer")
            except ServiceError as error:
                answers.append(str(error))

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()

    def prove() -> None:
        asking.join(180)
        if not (answers and "quarantined" in answers[0]):
            raise Failed(f"the poison call was not quarantined: {answers or 'no answer'}")

    return Strike("a call", {SERVING: "quarantined: [0-9]+ engines died"}, at_restart=True, prove=prove)


def slow_disk(world: World, rng: random.Random) -> Strike:
    """Each write of the ledger takes three seconds; streams do not."""
    switch = world.switches / "slow-disk"
    switch.write_text("3.0")
    served, before = world.served, len(world.served.lines)

    def prove() -> None:
        if not until_gone(lambda: served.said("ledger's disk has caught up", before) is None, 60.0):
            raise Failed("the ledger did not catch up")

    words = "the ledger's disk takes longer"
    mend = lambda: switch.unlink(missing_ok=True)  # noqa: E731
    return Strike("the state folder", {SERVING: words}, mend, prove=prove, silent=True)


def signal_group(world: World, rng: random.Random) -> Strike:
    """SIGTERM to every process of the front-end's group, as a service manager does: it ends in order."""
    served = world.served
    before = len(served.statuses)
    os.killpg(os.getpgid(served.pid), signal.SIGTERM)

    def prove() -> None:
        if served.statuses[before : before + 1] != [0]:
            raise Failed(f"the server ended with status {served.statuses[before:]}")

    return Strike("tp-decoders serve and its group", {SERVING: None}, prove=prove)


def kill_own_head(world: World, rng: random.Random) -> Strike:
    """The raylet or the GCS of a cluster that a server has started for itself: it ends with words, leaving nothing."""
    name = rng.choice(["raylet", "gcs_server"])
    return Strike(f"the {name} of a server's own cluster", {}, prove=partial(own_head_dies, world.served.model, name))


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
    "kill -9 of a serving rank": (12, strike_rank(SERVING, signal.SIGKILL)),
    "SIGSTOP of a serving rank": (6, strike_rank(SERVING, signal.SIGSTOP)),
    "kill -9 of a training rank": (8, strike_rank(TRAINING, signal.SIGKILL)),
    "SIGSTOP of a training rank": (6, strike_rank(TRAINING, signal.SIGSTOP)),
    "kill -9 of a raylet": (8, strike_raylet(signal.SIGKILL)),
    "SIGSTOP of a raylet": (6, strike_raylet(signal.SIGSTOP)),
    "host cut off": (8, cut_off),
    "kill -9 of the front-end": (8, kill_front_end),
    "kill -9 of the training command": (4, kill_train_command),
    "disk full": (6, fill_disk),
    "corrupt checkpoint": (4, corrupt_checkpoint),
    "corrupt model file": (2, corrupt_model),
    "refused connects": (4, refuse_connects),
    "hung engine thread": (4, hang_engine),
    "poison call": (4, poison_call),
    "killed head of an own cluster": (2, kill_own_head),
    "slow disk": (4, slow_disk),
    "SIGTERM to the process group": (4, signal_group),
}
"""How many of a hundred, and how."""


def possible(world: World) -> list[str]:
    """The kinds that can strike here."""
    without = {"host cut off"} if not world.hosts.can_cut else set()
    without |= {"disk full"} if world.disk is None else set()
    without |= set() if KEEPS_STATE else {"kill -9 of the front-end", "slow disk", "SIGTERM to the process group"}
    without |= set() if can_trace() else {"hung engine thread"}
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
