"""The front-end: admits calls, keeps the journal, turns engines' tokens into streams of text, survives the engines.

One event loop owns everything here. Sampling, scheduling and memory belong to the engines, which of them does what to
fleet.py, rules to parameter_rules.py, what happens to open requests to request_lifecycle.py, what is remembered of them
to open_requests.py.
"""

from __future__ import annotations

import asyncio
import enum
import logging
import math
import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from cluster.engine.request import EngineLoad, FinishReason, ModelLimits, Request
from cluster.frontend.call_traces import timed, trained
from cluster.frontend.fleet.engine_stats import total
from cluster.frontend.fleet.fleet import Fleet
from cluster.frontend.fleet.open_requests import AttachedEngine, Entry, OpenRequests
from cluster.frontend.fleet.replay import Replay
from cluster.frontend.fleet.request_builder import RequestBuilder
from cluster.frontend.fleet.request_lifecycle import RequestLifecycle
from cluster.frontend.fleet.request_metrics import RequestMetrics
from cluster.frontend.ledger.request_ledger import Ledger
from cluster.frontend.output.output_text import TextCodec
from cluster.frontend.output.streams import Stream
from cluster.frontend.requests.admission import Admission, guides_of
from cluster.frontend.requests.call import Call, FrontendConfig
from cluster.frontend.requests.call_costs import check_answer
from cluster.frontend.requests.content_hash import ContentKeys
from cluster.frontend.requests.offload import FairThreadPool
from cluster.frontend.requests.quarantine import Death, Quarantine
from cluster.frontend.training.train_requests import TrainRequests, check, with_loss
from cluster.frontend.training.weight_state import WeightState
from cluster.json_logs import REQUEST
from cluster.link.engine_link import EngineLink
from cluster.request_errors import Draining, EngineFault
from cluster.training.train_calls import TrainAnswer, TrainCall
from parallel.errors import RequestError, TpError

log = logging.getLogger(__name__)


class State(enum.Enum):
    """What a front-end can do for a new request."""

    STARTING = "starting"
    SERVING = "serving"
    RECOVERING = "recovering"  # no replica has an engine, open requests wait for one
    DRAINING = "draining"
    FAILED = "failed"
    CLOSED = "closed"


class Frontend:
    """Calls in, streams out, over one engine or several replicas of it. Make and use it inside one running event
    loop.
    """

    def __init__(
        self,
        links: EngineLink | Sequence[EngineLink],
        *,
        codec: TextCodec | None = None,
        config: FrontendConfig | None = None,
        ledger: Ledger | None = None,
    ) -> None:
        self.config = config or FrontendConfig()
        self.codec = codec
        self.state = State.STARTING
        self._journal = OpenRequests(self.config.max_open_requests)
        self._loop = asyncio.get_running_loop()
        self._observers: list[Callable[[State], None]] = []
        self._recovery: asyncio.TimerHandle | None = None
        self.fleet = Fleet(links if isinstance(links, Sequence) else [links], self._loop, self.config.routing)
        self._verdict = ""  # why no engine will come any more
        self.ledger = ledger
        self.quarantine = Quarantine() if ledger is None else Quarantine(ledger.deaths, ledger.note_deaths)
        self._delivery = RequestLifecycle(self._journal, self._loop, self.fleet, self.quarantine)
        self._opener = RequestBuilder(codec, self._delivery.leave)
        self._recall = None if ledger is None else Replay(ledger, self._journal, self._delivery, self._opener)
        self.pool = FairThreadPool()
        self.guides = guides_of(codec, lambda: self.limits)
        self._training = TrainRequests(self.meters.train, self.quarantine, self._delivery.trials)
        self.drained = asyncio.Event()
        """Set when a drain has ended: whoever runs the server may stop it then."""

    # ------------------------------------------------------------ the life of a call

    def start(self) -> None:
        """Begin to serve, with what a front-end before this one left unfinished."""
        self.fleet.start(self._delivery.apply, self.fault)
        if self._recall is not None:
            self._recall.go_on()
        self._become(State.SERVING)

    @timed("admission")
    async def open(self, call: Call) -> Stream:
        """Admit a call and return its stream; prompts that cannot be admitted are in `stream.errors`. Raises where
        none can.
        """
        self._check_open()
        admission = self._admission()
        admission.check(call)
        recall = self._recall if call.request_id else None  # an id that nobody knows is never asked for again
        call = replace(call, request_id=call.request_id or uuid.uuid4().hex)
        REQUEST.set(call.request_id)
        if recall is not None and (known := recall.again(call)) is not None:
            return known
        samples = len(call.prompts) * call.sampling.num_samples
        self._journal.check_room(call.caller, call.request_id, samples, call.share.caller)
        keys = ContentKeys()
        made = [self.quarantine.screened(item, keys) for item in await admission.requests(call)]
        self._check_open()
        failed = [item for item in made if isinstance(item, RequestError)]
        if len(failed) == len(made):
            raise failed[0]
        check_answer(call, made, self.limits)
        return await self._admit(call, made, recall, keys)

    @trained
    async def train(self, call: TrainCall) -> TrainAnswer:
        """One training call, between two steps of the engine."""
        self._check_open()
        self._check_engine()
        call = with_loss(call, self.limits)
        check(call, self.limits, self.config)
        return await self._training.train(self.fleet.replicas[0].link, call)  # a server that trains has one

    def abort(self, call_ids: Sequence[str], caller: str | None = None) -> int:
        """End calls by their ids, whosever they are or only a caller's own; returns how many prompts were still open.
        Their samples finish as ABORTED.
        """
        named = [entry for call_id in dict.fromkeys(call_ids) for entry in self._journal.of_call(call_id)]
        entries = [entry for entry in named if caller is None or entry.caller == caller]
        if self._recall is not None:
            self._recall.forget(entries)
        self._delivery.end(entries, FinishReason.ABORTED)
        return len(entries)

    async def tokenize(
        self, texts: Sequence[str], caller: str = "", answer_bytes: int | None = None, whole: bool = True
    ) -> list[tuple[int, ...]]:
        """The tokens of texts, or of parts of texts; each must fit the model's context, and together a message."""
        return await self._admission().all_ids(texts, caller, answer_bytes, whole)

    async def detokenize(
        self, sequences: Sequence[Sequence[int]], caller: str = "", answer_bytes: int | None = None
    ) -> list[str | RequestError]:
        """The text of each sequence of tokens, or what is wrong with it."""
        return await self._admission().all_texts(sequences, caller, answer_bytes)

    # ------------------------------------------------------------ the life of a server

    @property
    def limits(self) -> ModelLimits:
        return self.fleet.limits

    @property
    def num_open(self) -> int:
        return len(self._journal)

    def observe(self, observer: Callable[[State], None]) -> None:
        """Be told of every change of state, beginning with the present one."""
        self._observers.append(observer)
        observer(self.state)

    async def load(self, timeout: float = 5.0, prove: bool = False) -> EngineLoad:
        """The engines' counters, added up; to `prove`, after a canary through every rank."""
        return total((await self.loads(timeout, prove)).values())

    async def loads(self, timeout: float = 5.0, prove: bool = False) -> dict[AttachedEngine, EngineLoad | TpError]:
        """Those of each engine, or why it gave none."""
        self._check_engine()
        return await self.fleet.ask(timeout, prove)

    async def drain(self, grace: float) -> int:
        """Admit nothing more, wait for what is open, end what is left after `grace` seconds; returns how many that
        were.
        """
        if self.state not in (State.FAILED, State.CLOSED):
            self._become(State.DRAINING)
        try:
            async with asyncio.timeout(grace):
                await self._delivery.quiet.wait()
                await self._training.quiet.wait()
        except TimeoutError:
            log.warning("drain: %d prompts still open after %g s are ended", len(self._journal), grace)
        left = list(self._journal)
        self._delivery.end(left, FinishReason.ABORTED)
        self._training.fail(Draining("the server stopped before the training call was answered; it may be applied"))
        self.drained.set()
        return len(left)

    async def reattach(self, link: EngineLink, replica: int = 0) -> None:
        """Go on with a new engine: what has none is replayed from the journal, its reader sees a pause."""
        old = self.fleet.attach(replica, link)
        self._verdict = ""
        self._cancel_recovery()
        if self.state in (State.RECOVERING, State.FAILED):
            self._become(State.SERVING)
        self._delivery.resume()
        log.info("replica %d has a new engine; %d prompts are open", replica, len(self._journal))
        await asyncio.to_thread(old.close)

    def fault(self, cause: str, replica: int = 0) -> None:
        """A replica's engine is gone. What was open there goes on elsewhere at once; where no engine is left it waits
        `recovery_seconds` for one, then fails.
        """
        if self.state is State.CLOSED:
            return
        log.error("engine fault: %s", cause)
        self._go_on_without(replica, cause, self.config.recovery_seconds, died=True)

    def release(self, cause: str, replica: int = 0) -> None:
        """As after a fault, but on purpose: another engine is certain to come."""
        self._go_on_without(replica, cause, self.config.recovery_seconds or math.inf)

    def _go_on_without(self, replica: int, cause: str, patience: float, died: bool = False) -> None:
        seat, left = self.fleet.replicas[replica].seat, self.fleet.lose(replica, cause)
        if died and seat is not None:
            death = Death(replica, cause, seat.proved)
            guilty = self.quarantine.died([*left, *self._training.running], death)
            if isinstance(guilty, Entry):
                self._delivery.quarantined(guilty)
            elif guilty is not None:
                self._training.quarantined()
        self._training.fail(EngineFault(cause))
        if self.state is State.FAILED:
            return
        if self.fleet.has_engine:
            if left:
                log.warning("%d prompts of replica %d go on with the others", len(left), replica)
            self._delivery.resume()
        elif patience > 0:
            if self.state is not State.DRAINING:
                self._become(State.RECOVERING)
            self._cancel_recovery()
            self._recovery = self._loop.call_later(patience, self._give_up)
        else:
            self._give_up()

    @property
    def meters(self) -> RequestMetrics:
        """What was measured of requests and training calls."""
        return self._delivery.meters

    @property
    def training_under_way(self) -> bool:
        """Whether a training call has not been answered yet."""
        return not self._training.quiet.is_set()

    @property
    def fault_cause(self) -> str:
        """Which engines are gone, and why."""
        return self._verdict or self.fleet.fault

    @property
    def restarts(self) -> int:
        """How often another engine, or another connection to it, took over."""
        return sum(replica.restarts for replica in self.fleet.replicas)

    def waits_for(self, what: str, replica: int = 0) -> None:
        """While a replica has no engine: what its return waits for, for those who ask for the state."""
        if self.fleet.replicas[replica].seat is None and self.state is not State.CLOSED:
            self.fleet.replicas[replica].fault = what

    def fail(self, cause: str) -> None:
        """No new engine will come, and those that are there serve no more."""
        if self.state is State.CLOSED:
            return
        log.error("no engine is left: %s", cause)
        self._verdict = cause
        for replica in self.fleet.replicas:
            self.fleet.lose(replica.index, cause)
        self._training.fail(EngineFault(cause))
        self._cancel_recovery()
        self._give_up()

    @property
    def weights(self) -> WeightState:
        """What training has made of the engine's weights."""
        return self._training.weights

    async def close(self, timeout: float = 10.0) -> None:
        """End everything that is open and let go of the engine."""
        self._become(State.CLOSED)
        self._training.fail(Draining("the server was closed before the call had its turn"))
        self._cancel_recovery()
        self._delivery.end(list(self._journal), FinishReason.ABORTED)
        await self.fleet.close(timeout)
        self.pool.close()

    # ------------------------------------------------------------ admission

    def _admission(self) -> Admission:
        return Admission(limits=self.limits, config=self.config, codec=self.codec, pool=self.pool, guides=self.guides)

    def _check_open(self) -> None:
        if self.state in (State.DRAINING, State.CLOSED):
            raise Draining("the server is shutting down and admits nothing more; send the request elsewhere")
        if self.state is State.STARTING:
            raise Draining("the server has not started to serve; retry shortly")
        if self.state is State.FAILED:
            self._check_engine()

    def _check_engine(self) -> None:
        if not self.fleet.has_engine:
            raise EngineFault(self.fault_cause)

    async def _admit(
        self, call: Call, made: Sequence[Request | RequestError], recall: Replay | None, keys: ContentKeys
    ) -> Stream:
        stream, entries = await self._opener.open_in_turns(call.request_id, call.sampling.n, made)
        self._check_open()
        for entry in entries:
            entry.account, entry.caller = call.account, call.caller
            self.quarantine.suspect(entry, partial(keys.both, entry.request))
        self._delivery.begin(entries)
        if recall is not None:
            recall.record(call, made, entries)
        self._delivery.trials.submit(entries)
        return stream

    # ------------------------------------------------------------ changes of state

    def _give_up(self) -> None:
        """No new engine came: everything that is open fails with the cause."""
        self._become(State.FAILED)
        error = EngineFault(self.fault_cause)
        for entry in self._journal:
            self._delivery.fail(entry, error)

    def _cancel_recovery(self) -> None:
        if self._recovery is not None:
            self._recovery.cancel()
            self._recovery = None

    def _become(self, state: State) -> None:
        if self.state is State.CLOSED or state is self.state:
            return
        self.state = state
        for observer in self._observers:
            observer(state)
