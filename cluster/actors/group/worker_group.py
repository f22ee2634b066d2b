"""A group of ranks on a Ray cluster: placed, started, watched, rebuilt after a fault, and ended together.

One actor per rank, one long-running call per actor: when a rank dies its call ends, and `ray.wait` tells within a
second; one that is frozen is found because it no longer answers (heartbeat.py). Ray carries nothing else: what the
ranks do step by step travels over their own collectives. Which event leads from where to where is group_states.py's
table; whether and how often to rebuild is its owner's business.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError

from cluster.actors.group.group_states import Event, GroupState, Stage
from cluster.actors.group.heartbeat import Heartbeat, outcome, slow_start, unanswering
from cluster.actors.group.placement import LOOPBACK, Place, PlacementConfig, Share, assign, meeting_point
from cluster.actors.group.placement_group import PROBE_EVERY_S, Bundles, Tell
from cluster.actors.group.root_cause import Fault, NoAnswer, describe, root_cause
from cluster.actors.group.shutdown import end_ranks
from cluster.actors.group.worker import Lease, MakeProgram, Phases, Ready, Worker, is_consequence
from cluster.supervision import Patience, supervised
from parallel.errors import WorkerError

log = logging.getLogger(__name__)
GRACE_S = 1.0
"""After one rank fails the others' failures are awaited this long: the first to arrive is often a consequence."""
SETTLE_S = 15.0
"""How long a surviving rank may take to leave the collective that a lost one broke: its limit, and a little more."""
ANSWER_S = 5.0
STAFF_TRIES = 4  # of one rebuild: Ray takes a while to know that a node is lost
WATCH_S = 10.0
"""How long errors of Ray's own are borne while ranks are watched; then they cannot be watched, which is a fault."""
CLOSED = "the group was closed while it started"
SILENT = "its process gives no sign of life: it is frozen, or its node cannot be reached"


class WorkerGroup:
    """`size` ranks of one program. `start` returns when all are ready; a later failure is told once, to `on_fault`.
    Then it can be rebuilt, or closed."""

    def __init__(
        self,
        make: MakeProgram,
        size: int,
        device: str = "cpu",
        config: PlacementConfig | None = None,
        share: Share | None = None,
    ) -> None:
        self.config = config or PlacementConfig()
        self._share, self._make = share, make
        self._size, self._device, self._life = size, device, 0
        self._actors: list[Any] = []
        self._places: list[Place] = []
        self._runs: list[ray.ObjectRef] = []
        self._ready: list[Ready] = []
        self._closing = threading.Event()
        self._bundles = Bundles(size, device, self.config, self._closing)
        self._on_fault: Callable[[str], None] | None = None
        self._silent: list[int] = []
        self._stages = GroupState()
        self._watcher: threading.Thread | None = None

    def start(self, on_fault: Callable[[str], None] | None = None) -> list[Ready]:
        """Places and starts every rank; on failure nothing is left behind and the error names rank, node and cause."""
        self._stages.take(Event.START)
        self._on_fault = on_fault
        phases = Phases()
        try:
            with phases("placing"):
                self._bundles.reserve()
            self._check_open()
            with phases("starting processes"):
                self._staff([])
            self._meet()
            self._ready = [replace(rank, seconds=phases.seconds | rank.seconds) for rank in self._await_ready()]
        except BaseException:
            closed = self._closing.is_set()  # beside it: then that is why it failed, whatever failed
            self._end(ask=False)
            if closed:
                raise WorkerError(CLOSED) from None
            raise
        self._begin_watch()
        return self._ready

    def rebuild(self, tell: Tell = log.warning, make: MakeProgram | None = None, keep: bool = True) -> list[Ready]:
        """After a fault, or where its ranks work but cannot be used: ranks that survived go on with what they hold
        (unless `keep` is False), the others are started again, where there is room, which is waited for; `tell` is
        told so. After an error here: once more, with keep=False.
        """
        self._stages.take(Event.REBUILD)
        self._make = make or self._make
        try:
            kept = self._rebuilt(keep, tell)
        except RayError as error:
            failed = WorkerError(f"the group could not be rebuilt: {describe(error)}")
            self._stages.take(Event.FAULT, str(failed))
            raise failed from error
        except BaseException as error:
            self._stages.take(Event.FAULT, str(error))
            self._check_open()
            raise
        finally:
            if self._closing.is_set():
                self._end(ask=False)  # what was started meanwhile
        self._begin_watch()
        if self._stages.stage is not Stage.RUNNING:
            raise WorkerError(f"the group was lost while it was rebuilt: {self._stages.fault or 'it was closed'}")
        log.warning("the group is whole again: ranks %s went on, the others were started again", kept or "none")
        return self._ready

    def _rebuilt(self, keep: bool, tell: Tell) -> list[int]:
        """One attempt; the ranks that went on."""
        self._check_open()
        kept = self._survivors() if keep else []
        self._let_go(kept)
        self._reserve_again(kept, tell)
        self._life += 1
        self._meet()
        self._ready = self._await_ready()
        return kept

    def _reserve_again(self, kept: Sequence[int], tell: Tell) -> None:
        """Room and a living process for every rank. Ray may still offer a node that is lost: then once more."""
        if not kept:
            self._bundles.release()
            self._bundles.reserve_patiently(tell)
        for tries_left in reversed(range(STAFF_TRIES)):
            self._bundles.await_whole(tell)
            self._check_open()
            try:
                self._staff(kept)
                break
            except WorkerError as error:
                if not tries_left or self._closing.is_set():
                    raise
                tell(f"waiting for room: {error}")
                self._kill([rank for rank in range(self._size) if rank not in kept])

    def observe(self, on_fault: Callable[[str], None]) -> None:
        """Be told of each failure, in a foreign thread; at once of one that happened already."""
        self._on_fault = on_fault
        if self._stages.fault is not None:
            on_fault(self._stages.fault)

    def wait_fault(self, timeout: float) -> str | None:
        """What ended the group, if anything does within the time."""
        return self._stages.wait_fault(timeout)

    def give_up(self, cause: str) -> None:
        """From outside: the ranks seem well but cannot be used; the group counts as failed."""
        self._stages.take(Event.FAULT, cause)

    def close(self) -> None:
        """Ends every rank: asked first, killed after `stop_timeout_s`. Harmless when repeated."""
        self._end(ask=self._stages.stage is Stage.RUNNING)

    def abandon(self) -> None:
        """Ray is gone, and the ranks with it: nothing is asked of either any more."""
        self._closing.set()
        self._stages.take(Event.CLOSE)

    def _end(self, ask: bool) -> None:
        self._closing.set()
        self._stages.take(Event.CLOSE)
        pids = self._pids_here() if ask and self._runs else None
        end_ranks(self._actors, self._runs, self._life, self.config.stop_timeout_s, pids)
        self._bundles.release()
        if self._watcher is not None and self._watcher is not threading.current_thread():
            self._watcher.join(self.config.stop_timeout_s)
        self._actors, self._runs = [], []

    def _pids_here(self) -> list[int | None]:
        """The processes that this one can end without Ray."""
        here = ray.util.get_node_ip_address()
        return [rank.pid if rank.place.node == here else None for rank in self._ready]

    def _check_open(self) -> None:
        if self._closing.is_set():
            raise WorkerError(CLOSED)

    # ------------------------------------------------------------ starting

    def _staff(self, kept: Sequence[int]) -> None:
        """A process that answers for every rank; those that are not kept are started."""
        nodes = self._bundles.nodes()
        self._actors = [
            self._actors[rank] if rank in kept else self._actor(rank, nodes[rank]) for rank in range(self._size)
        ]
        waiting = {actor.pid.remote(): rank for rank, actor in enumerate(self._actors)}
        deadline = time.monotonic() + self.config.start_timeout_s
        while waiting and time.monotonic() < deadline:
            self._check_open()
            for answer in ray.wait(list(waiting), timeout=PROBE_EVERY_S)[0]:
                rank, error = waiting.pop(answer), outcome(answer)
                if error is not None:
                    raise WorkerError(f"rank {rank} on {nodes[rank]}: its process did not start: {describe(error)}")
        if waiting:
            late = ", ".join(f"rank {rank} on {nodes[rank]}" for rank in waiting.values())
            raise WorkerError(f"{late}: no process within {self.config.start_timeout_s:g} s")

    def _meet(self) -> None:
        """Calls each rank's `run` with its place."""
        nodes = self._bundles.nodes()
        try:
            port = ray.get(self._actors[0].free_port.remote(), timeout=ANSWER_S)
        except (RayActorError, GetTimeoutError) as error:
            raise WorkerError(f"rank 0 on {nodes[0]}: its process did not start: {describe(error)}") from error
        host = LOOPBACK if len(set(nodes)) == 1 else nodes[0]
        address = meeting_point(host, port) if self._size > 1 else None
        self._places = assign(nodes, address, self._life, secrets.token_bytes(32), self._listen(nodes[0]))
        if self._share is not None:
            self._places = self._share(self._places, self._closing)
        ranks = zip(self._actors, self._places, strict=True)
        self._runs = [actor.run.remote(place, self._make) for actor, place in ranks]

    def _actor(self, rank: int, node: str) -> Any:
        log.info("starting rank %d on %s", rank, node)
        more, lease = self._terms(rank)
        options = ray.remote(Worker).options(
            num_cpus=1,
            num_gpus=1 if self._device == "cuda" else 0,
            max_concurrency=8,  # run, ready, stop, and questions
            max_restarts=0,
            scheduling_strategy=self._bundles.strategy(rank),
            **more,
        )
        return options.remote(rank, self.config.log_level, self.config.log_json, lease)

    def _listen(self, node: str) -> str | None:
        """Where rank 0's engine listens: to this machine alone where its front-end, this process, is there too."""
        return LOOPBACK if node == ray.util.get_node_ip_address() else None

    def _terms(self, rank: int) -> tuple[dict[str, Any], Lease | None]:
        """What else Ray is told of a rank's process, and its lease: none, it ends with this one."""
        return {}, None

    def _await_ready(self) -> list[Ready]:
        """Every rank's report; the first failure or the time limit ends the wait."""
        deadline = time.monotonic() + self.config.start_timeout_s
        reports = [actor.ready.remote(self._life) for actor in self._actors]
        ready: dict[ray.ObjectRef, Ready] = {}
        while len(ready) < self._size:
            self._check_open()
            waiting = [report for report in reports if report not in ready]
            if time.monotonic() > deadline:
                late = [(self._places[i], self._actors[i]) for i in range(self._size) if reports[i] in waiting]
                raise WorkerError(slow_start(late, self._life, self.config.start_timeout_s))
            for report in ray.wait(waiting, timeout=PROBE_EVERY_S)[0]:
                try:
                    ready[report] = ray.get(report)
                except (WorkerError, RayActorError) as error:
                    raise self._root_cause([]).at_start() from error
        return [ready[report] for report in reports]

    # ------------------------------------------------------------ what went wrong

    def _root_cause(self, silent: Sequence[int]) -> Fault:
        """Of the ranks that have failed or fail within a moment, the one that the others' failures follow from."""
        ray.wait(self._runs, num_returns=len(self._runs), timeout=GRACE_S)
        ended = self._ended()
        if not silent and all(is_consequence(fault.original) for fault in ended.values()):  # of a rank that hangs?
            silent = unanswering({rank: self._actors[rank] for rank in range(self._size) if rank not in ended})
        self._silent = list(silent)
        for rank in silent:
            ended[rank] = Fault(self._places[rank], NoAnswer(SILENT))
        unknown = Fault(self._places[0], WorkerError("the group failed, and none of its ranks says why"))
        return root_cause([*ended.values()] or [unknown])

    def _ended(self) -> dict[int, Fault]:
        """How the ranks' calls ended, of those that did."""
        done, _ = ray.wait(self._runs, num_returns=len(self._runs), timeout=0)
        places = enumerate(zip(self._places, self._runs, strict=True))
        return {rank: Fault(place, outcome(run)) for rank, (place, run) in places if run in done}

    def _begin_watch(self) -> None:
        self._stages.take(Event.READY)
        watch = partial(self._watch, self._life)
        self._watcher = supervised("worker-group-watch", watch, lambda error: self._fail(f"not watched: {error!r}"))

    def _watch(self, life: int) -> None:
        """Until a rank is lost, or this life is over. An error of Ray's own is borne for a while."""
        patience, pulse = Patience(WATCH_S), Heartbeat(self._actors, self.config.silence_s)
        while self._watched(life):
            try:
                ended, _ = ray.wait(self._runs, timeout=PROBE_EVERY_S)
                silent = pulse.beat() if self._watched(life) else []
                if (ended or silent) and self._watched(life):
                    self._fail(self._root_cause(silent).message())
                patience.reset()
            except RayError as error:
                log.warning("Ray does not say how the ranks are: %s", describe(error))
                if (pause := patience.pause()) is None:
                    self._fail(f"the ranks cannot be watched any more: {describe(error)}")
                else:
                    self._closing.wait(pause)

    def _watched(self, life: int) -> bool:
        return self._stages.stage is Stage.RUNNING and life == self._life and not self._closing.is_set()

    def _fail(self, cause: str) -> None:
        if not self._stages.take(Event.FAULT, cause):
            return  # somebody was faster, or it is being closed
        log.error("%s", cause)
        if self._on_fault is not None:
            self._on_fault(cause)

    # ------------------------------------------------------------ who survived

    def _survivors(self) -> list[int]:
        """The ranks whose process goes on and keeps what it holds: those that only lost a peer; no CUDA rank does."""
        if self._device == "cuda":
            return []
        own = [rank for rank, fault in self._ended().items() if not is_consequence(fault.original)]
        self._kill([*own, *self._silent])  # first of all: their peers learn of it, and leave the collective
        living = {rank: run for rank, run in enumerate(self._runs) if rank not in (*own, *self._silent)}
        ray.wait(list(living.values()), num_returns=len(living), timeout=SETTLE_S)
        bereaved = [rank for rank, fault in self._ended().items() if rank in living and is_consequence(fault.original)]
        asked = {self._actors[rank].kept.remote(): rank for rank in bereaved}
        if not asked:
            return []
        answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER_S)
        return sorted(asked[answer] for answer in answered if outcome(answer) is None and ray.get(answer))

    def _kill(self, ranks: Sequence[int]) -> None:
        """Ends their processes; a frozen one at once, where a rank beside it can do that."""
        for rank in ranks:
            if rank in self._silent and self._ready:
                node, pid = self._places[rank].node, self._ready[rank].pid
                for neighbour, actor in enumerate(self._actors):
                    if neighbour not in self._silent and self._places[neighbour].node == node:
                        actor.end_neighbour.remote(pid)
            ray.kill(self._actors[rank])

    def _let_go(self, kept: Sequence[int]) -> None:
        lost = [rank for rank in range(len(self._actors)) if rank not in kept]
        self._kill(lost)
        runs = [self._runs[rank] for rank in lost]
        if runs:
            ray.wait(runs, num_returns=len(runs), timeout=self.config.stop_timeout_s, fetch_local=False)
        self._silent, self._ready = [], []
